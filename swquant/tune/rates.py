"""The learning rate, found out: a short look at several, since the rate decides more than the method.

Every rate trains for a quarter of the steps (at least six), from zeros, with its own fall to zero, and is judged by the
loss on held-out text. The look begins at 1e-3 and goes to three times as much, and to a third, as long as that is
better; so it ends at a rate that is better than both of its neighbours. It is deterministic, and its cost is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from swquant.progress import Progress
from swquant.training.loop import DivergedError, Schedule, train
from swquant.units import short

__all__ = ["look", "steps_of_look"]

_FIRST, _FACTOR, _MOST = 1e-3, 3.0, 6


def steps_of_look(steps: int) -> int:
    """How many steps each rate gets."""
    return min(max(steps // 4, 6), steps)


def look(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int, int], Tensor],
    held_out: Callable[[], float],
    schedule: Schedule,
    progress: Progress,
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

    best = _FIRST
    for factor in (_FACTOR, 1 / _FACTOR):
        while len(tried) < _MOST and loss_at(short(best * factor, 2)) < loss_at(best):
            best = short(best * factor, 2)
    return tried
