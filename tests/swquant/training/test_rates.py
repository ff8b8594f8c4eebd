"""A learning rate is looked for once, begins where it is told to, and puts everything back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters.errors import SwquantError
from swquant.progress import silent
from swquant.training.loop import Schedule
from swquant.training.rates import settle, steps_of_look

SCHEDULE = Schedule(24, 0.0)


def settled(goal: float, facts: dict[str, Any], asked: float | None = None) -> tuple[float, float, int]:
    """(rate, the weight afterwards, steps taken) for a weight of 0 that is to become `goal`: Adam's steps are as long
    as the rate."""
    weight, taken = nn.Parameter(torch.zeros(1)), 0

    def loss_of(step: int, part: int) -> Tensor:
        nonlocal taken
        taken += 1
        return ((weight - goal) ** 2).sum()

    rate = settle(
        asked, facts, {"w": weight}, loss_of, lambda: abs(float(weight.detach()) - goal), SCHEDULE, silent, usual=1e-2
    )
    return rate, float(weight.detach()), taken


def test_the_rate_with_the_least_loss_is_taken_and_remembered() -> None:
    facts: dict[str, Any] = {}
    rate, weight, taken = settled(0.09, facts)  # six steps of 3e-2, falling to zero, are 0.105
    assert (rate, weight) == (0.03, 0.0)
    assert taken == len(facts["tried"]) * steps_of_look(SCHEDULE.steps)
    assert facts["tried"]["0.03"] == min(facts["tried"].values())
    assert settled(0.09, facts) == (0.03, 0.0, 0)


def test_a_rate_that_was_asked_for_is_not_looked_for() -> None:
    facts: dict[str, Any] = {}
    assert settled(1.0, facts, asked=0.5) == (0.5, 0.0, 0)
    assert facts == {"rate": 0.5, "tried": {}}


def test_rates_that_all_diverge_are_refused() -> None:
    with pytest.raises(SwquantError, match="the loss diverged at every learning rate from 0.0033 to 0.03"):
        settled(float("nan"), {})
