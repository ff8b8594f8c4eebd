"""One cell: a method trained at a rate with a seed, timed and measured; and the speed of steps alone.

Seconds are of the wall, from step to step with the device at rest in between, and their median is taken, so that the
first steps do not count more than others. Peak memory is what a GPU held beside what lay there before (the checkpoint's
model, and a teacher): the student, its adapter, its gradients and moments, and what passes through. Of a CPU it is not
known.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swquant.training.loop import DivergedError, Schedule, train
from swquant.tune.session import Session
from tuning.methods import METHODS, usual_selection
from tuning.peers import Trainee
from tuning.results import Case, Cell
from tuning.world import World

__all__ = ["before", "shares", "speed", "trained"]

_WARM = 5  # steps that are not timed


def synchronized(device: torch.device) -> float:
    """Now, with the device at rest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device, *, most: bool = False) -> int:
    """Bytes of a GPU that tensors hold, or at most held since they were asked for last."""
    if most:
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    gc.collect()  # a model of before may hang in a circle
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def common(world: World, case: Case) -> int:
    """Bytes of a GPU that what all methods share takes, which is loaded now if it was not before."""
    world.session(world.base, case, 0)
    return allocated(world.device)


def steps_of(
    trainee: Trainee, session: Session, steps: int, rate: float, device: torch.device, warm: int = 0
) -> float | None:
    """Train; the median of the seconds of a step, None where it diverged."""
    times: list[float] = []
    allocated(device)  # what choosing blocks took is no part of the peak

    def loss_of(step: int, part: int) -> Tensor:
        times.append(synchronized(device))
        return session.loss_of(step, part)

    try:
        train(trainee.parameters, loss_of, Schedule(steps, rate))
    except DivergedError:
        return None
    times.append(synchronized(device))
    return statistics.median(later - now for now, later in zip(times[warm:], times[warm + 1 :], strict=False))


def before(world: World, case: Case) -> Cell:
    """The checkpoint as it is."""
    return world.measured(world.base, case)


def trained(world: World, case: Case, method: str, rate: float, seed: int) -> Cell:
    """held_out is None where it diverged."""
    lay_there = common(world, case)
    trainee = METHODS[method].make(world, case, seed)
    numbers = sum(parameter.numel() for parameter in trainee.parameters.values())
    cell: Cell = {"bytes": trainee.nbytes, "parameters": numbers, "held_out": None}
    session = world.session(trainee.model, case, seed)
    seconds = steps_of(trainee, session, session.options.steps, rate, world.device)
    if seconds is None:
        return cell
    cell |= {"seconds": seconds, "peak": allocated(world.device, most=True) - lay_there}
    if trainee.rounds:
        with torch.no_grad():
            for parameter in trainee.parameters.values():
                parameter.copy_(parameter.to(torch.bfloat16))
    cell |= world.measured(trainee.model, case)
    return {**cell, "places": shares(world, case, trainee)} if trainee.places else cell


def shares(world: World, case: Case, trainee: Trainee) -> dict[str, dict[str, list[int]]]:
    """Kind of projection -> layer -> [chosen blocks, blocks]. A module without a number is of layer 0."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, candidate in world.plan(case).pool.items():
        module = candidate.weight.module
        kind, number = module.rpartition(".")[2], re.search(r"\.(\d+)\.", module)
        here = found.setdefault(kind, {}).setdefault(number[1] if number else "0", [0, 0])
        here[0] += len(trainee.places[name]) if name in trainee.places else 0
        here[1] += candidate.grid[0] * candidate.grid[1]
    return found


def speed(world: World, case: Case, method: str, precision: str, steps: int) -> Cell:
    """Seconds of a step and memory, cross entropy, alone on the machine."""
    name = usual_selection(case) if method == "blocks" else method
    lay_there = common(world, case)
    trainee = METHODS[name].make(world, case, 0)
    session: Any = world.session(trainee.model, case, 0)
    session = replace(session, options=replace(session.options, precision=precision))
    seconds = steps_of(trainee, session, steps + _WARM, 1e-5, world.device, _WARM)
    numbers = sum(parameter.numel() for parameter in trainee.parameters.values())
    peak = allocated(world.device, most=True) - lay_there
    return {"seconds": seconds, "peak": peak, "parameters": numbers, "bytes": trainee.nbytes}
