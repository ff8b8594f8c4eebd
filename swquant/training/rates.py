"""The learning rate, found out: a short look at several, since the rate decides more than the method.

Every rate trains for a quarter of the steps (at least six), from where the parameters are, with its own fall to zero,
and is judged by the loss on held-out text. The look begins at a usual rate and goes to three times as much, and to a
third, as long as that is better; so it ends at a rate that is better than both of its neighbours. It is deterministic,
and its cost is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from exporters.errors import SwquantError
from swquant.progress import Progress
from swquant.training.loop import DivergedError, Schedule, train
from swquant.units import short

__all__ = ["look", "settle", "steps_of_look"]

_FACTOR, _MOST = 3.0, 6


def settle(
    asked: float | None,
    facts: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int, int], Tensor],
    held_out: Callable[[], float],
    schedule: Schedule,
    progress: Progress,
    *,
    usual: float,
) -> float:
    """The rate that was asked for, or the best one of a look. facts: of the run's state, which keep `rate` and `tried`
    (the rates looked at -> held-out loss, None where that is no number), so that a run that goes on does not look
    again. Raises SwquantError where all diverged."""
    if "rate" not in facts:
        tried = {} if asked is not None else look(parameters, loss_of, held_out, schedule, progress, usual=usual)
        facts["tried"] = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in tried.items()}
        facts["rate"] = _best(tried) if asked is None else asked
    rate: float = facts["rate"]
    return rate


def _best(tried: Mapping[float, float]) -> float:
    """The rate with the least held-out loss, the smaller one of equals. Raises SwquantError where all diverged."""
    rate = min(sorted(tried), key=tried.__getitem__)
    if not math.isfinite(tried[rate]):
        raise SwquantError(
            f"the loss diverged at every learning rate from {min(tried):g} to {max(tried):g}; is the text sound?"
        )
    return rate


def steps_of_look(steps: int) -> int:
    """How many steps each rate gets."""
    return min(max(steps // 4, 6), steps)


def look(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int, int], Tensor],
    held_out: Callable[[], float],
    schedule: Schedule,
    progress: Progress,
    *,
    usual: float,
) -> dict[float, float]:
    """Rate -> held-out loss after the look, infinite where it diverged; at most six rates, in the order of the look.

    The parameters are put back to what they were.
    """
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tried: dict[float, float] = {}

    def loss_at(rate: float) -> float:
        if rate not in tried:
            try:
                short_one = replace(schedule, steps=steps_of_look(schedule.steps), rate=rate)
                train(parameters, loss_of, short_one, progress=progress, label=f"Looking at rate {rate:g}")
                loss = held_out()
            except DivergedError:
                loss = math.inf
            tried[rate] = loss if math.isfinite(loss) else math.inf
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])
        return tried[rate]

    best = usual
    for factor in (_FACTOR, 1 / _FACTOR):
        while len(tried) < _MOST and loss_at(short(best * factor, 2)) < loss_at(best):
            best = short(best * factor, 2)
    return tried
