"""The loop: steps of AdamW on a few parameters, which go on after an interruption to the same bytes.

It knows no model and no data. `loss_of(step, part)` is the loss of one micro-batch and depends on nothing but these two
numbers and the parameters, so what is needed to go on is small: the parameters, Adam's two moments of each, the number
of the step, and the losses so far. They are written into one safetensors file beside OUT, whole or not at all.

Processes that train together (`swquant.parallel`) each take such steps on their share of a batch: `loss_of` gives this
share of the loss, and losses and gradients are summed over all before they are clipped and a step is taken.

AdamW with beta (0.9, 0.95), no weight decay, the rate falling linearly to zero: what Sparse Matrix Tuning
(arXiv:2405.15525) trains with. Gradients are clipped to a norm of 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from exporters.errors import CheckpointError, SwquantError
from exporters.safetensors_file import SafetensorsReader
from swquant.interrupts import sigterm_interrupts, uninterrupted
from swquant.output.destination import write_whole, writing
from swquant.parallel import ProcessGoneError, world
from swquant.progress import Progress, silent

__all__ = ["DivergedError", "Saved", "Schedule", "State", "Trained", "fingerprint_of", "train"]

_FORM = "swquant-training-1"
_BETAS, _CLIP = (0.9, 0.95), 1.0
_EVERY = 30.0  # seconds from one writing of the state to the next, or, of a large one,
_SHARE = 20  # so many times what the writing took


class DivergedError(SwquantError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Schedule:
    """steps of `parts` micro-batches each (gradient accumulation); rate: that of the first step, falling to zero.
    tokens: of a step, about, for progress."""

    steps: int
    rate: float
    parts: int = 1
    tokens: int = 1

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.rate * (1 - step / self.steps)


@dataclass
class Saved:
    """What a state holds: tensors and facts (JSON) of whoever trains, and how far the loop came."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass
class State:
    """What an interrupted run goes on from: a file that belongs to one result, which `fingerprint` tells. saved: what
    it holds, or will when `write` is called; empty where there is no file, or one of another result. Of processes that
    train together the first one reads and writes the file; how many they are may differ from run to run."""

    path: Path
    fingerprint: str
    saved: Saved = field(default_factory=Saved)

    @staticmethod
    def at(path: Path, fingerprint: str) -> State:
        """The state of an earlier run of this result, or an empty one. Raises SwquantError for a file that is none of
        ours, which is not written over, and where processes that train together are not about one result."""
        ours, read = world(), Saved()

        def known() -> dict[str, Any]:
            nonlocal read
            read = _read(path, fingerprint)
            return {"of": fingerprint, "facts": read.facts, "step": read.step, "losses": read.losses}

        told = ours.same(known)
        if told.pop("of") != fingerprint:
            raise SwquantError(
                f"process {ours.rank} of this run has other inputs than the first (model, text, options or kind of device); "
                "give all the same"
            )
        tensors, moments = ours.same_tensors(lambda: read.tensors), ours.same_tensors(lambda: read.moments)
        return State(path, fingerprint, Saved(tensors, moments=moments, **told))

    def write(self) -> None:
        """Put it on the disk, whole or not at all."""
        if not world().first:
            return
        saved = self.saved
        facts = {"facts": saved.facts, "step": saved.step, "losses": saved.losses}
        groups = {"tensors": saved.tensors, "moments": saved.moments}
        content = {
            f"{group}/{name}": item.contiguous() for group, items in groups.items() for name, item in items.items()
        }
        metadata = {"format": _FORM, "fingerprint": self.fingerprint, "facts": json.dumps(facts)}
        with writing(self.path, sum(item.nbytes for item in content.values())):
            write_whole(self.path, safetensors.torch.save(content, metadata))

    def remove(self) -> None:
        """The result is there: nothing is left to go on from."""
        if world().first:
            self.path.unlink(missing_ok=True)


def _read(path: Path, fingerprint: str) -> Saved:
    """What a file holds, nothing where there is none or it belongs to another result."""
    if not path.exists():
        return Saved()
    try:
        with SafetensorsReader(path) as reader:
            if reader.metadata.get("format") != _FORM:
                raise SwquantError(f"{path}: in the way, and no state of swquant; move it elsewhere")
            if reader.metadata.get("fingerprint") != fingerprint:
                return Saved()
            known = json.loads(reader.metadata["facts"])
            tensors = {name: reader.read(name) for name in reader.entries}
    except (CheckpointError, KeyError, ValueError) as error:
        raise SwquantError(f"{path}: a damaged state ({error}); delete it to begin anew") from None
    groups: dict[str, dict[str, Tensor]] = {"tensors": {}, "moments": {}}
    for name, tensor in tensors.items():
        group, _, local = name.partition("/")
        groups[group][local] = tensor
    return Saved(groups["tensors"], known["facts"], groups["moments"], known["step"], known["losses"])


def fingerprint_of(*facts: Any) -> str:
    """sha256 of what a result depends on, as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Trained:
    """losses: of every step, before it was taken."""

    losses: list[float]


def train(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int, int], Tensor],
    schedule: Schedule,
    *,
    state: State | None = None,
    progress: Progress = silent,
    label: str = "Training",
) -> Trained:
    """Take all steps, those aside that `state` has taken already; the parameters are changed in place.

    parameters: by names that stay the same from run to run. loss_of: (step, part) -> a loss, or this process's share of
    it. Raises DivergedError where the loss or a gradient is NaN or infinite, with the parameters as they were after the
    last good step, and KeyboardInterrupt, or ProcessGoneError where others train along, with the state written.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=schedule.rate, betas=_BETAS, weight_decay=0.0)
    saved = state.saved if state is not None else Saved()
    if saved.step:
        _put(saved, parameters, optimizer)
    losses, written, pause = list(saved.losses), time.monotonic(), _EVERY
    with ExitStack() as stack:
        stack.enter_context(sigterm_interrupts())
        bar = stack.enter_context(progress.tokens(label, (schedule.steps - saved.step) * schedule.tokens))
        try:
            for step in range(saved.step, schedule.steps):
                loss = _gradients(parameters, loss_of, schedule, step)
                with uninterrupted():
                    for group in optimizer.param_groups:
                        group["lr"] = schedule.rate_at(step)
                    optimizer.step()
                    losses.append(loss)
                bar.advance(f"loss {loss:.4f}", schedule.tokens)
                if state is not None and world().first and time.monotonic() - written > pause:
                    begun = time.monotonic()
                    _take(state, parameters, optimizer, losses)
                    state.write()
                    written = time.monotonic()
                    pause = max(_EVERY, _SHARE * (written - begun))
        except (KeyboardInterrupt, DivergedError, ProcessGoneError) as end:
            if state is not None:
                with uninterrupted():
                    if world().first:
                        _take(state, parameters, optimizer, losses)
                        state.write()
                    if world().first or not isinstance(end, ProcessGoneError):  # it may be the first that has gone
                        end.add_note(f"what was trained stays in {state.path}, and the next run goes on from it")
            raise
    for parameter in parameters.values():
        parameter.grad = None  # whoever looks ahead inside a step must leave nothing that this step would add to
    return Trained(losses)


def _gradients(
    parameters: Mapping[str, nn.Parameter], loss_of: Callable[[int, int], Tensor], schedule: Schedule, step: int
) -> float:
    """Fill the gradients with those of a step, clipped. Returns its loss. Both are summed over all processes: what is
    no number in one is none in all."""
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for part in range(schedule.parts):
        loss = loss_of(step, part) / schedule.parts
        total += float(loss.detach())
        if math.isfinite(total):
            loss.backward()
    for parameter in parameters.values():
        if (
            parameter.grad is None
        ):  # of an expert that no token was given to: without moments a state could not be put back
            parameter.grad = torch.zeros_like(parameter)
    (total,) = world().totals(total)
    norm = math.nan
    if math.isfinite(total):
        world().sum_(parameter.grad for parameter in parameters.values() if parameter.grad is not None)
        norm = float(nn.utils.clip_grad_norm_(parameters.values(), _CLIP))
    if not math.isfinite(norm):
        raise DivergedError(
            f"the loss of step {step + 1} is NaN or infinite at a learning rate of {schedule.rate:g}; lower it"
        )
    return total


def _take(
    state: State, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    """Bring a state up to date."""
    saved = state.saved
    saved.step, saved.losses = len(losses), list(losses)
    for name, parameter in parameters.items():
        saved.moments[f"values/{name}"] = parameter.detach().cpu().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            if parameter in optimizer.state:
                saved.moments[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().clone()


def _put(saved: Saved, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Bring parameters and optimizer where a state was. Raises SwquantError where it is of other parameters."""
    for name, parameter in parameters.items():
        found = [saved.moments.get(f"{key}/{name}") for key in ("values", "exp_avg", "exp_avg_sq")]
        if any(item is None or item.shape != parameter.shape for item in found):
            raise SwquantError(f"the state of the earlier run does not hold {name}; delete it to begin anew")
        values, *moments = (item.to(parameter) for item in found if item is not None)
        with torch.no_grad():
            parameter.copy_(values)
        average, square = moments
        optimizer.state[parameter] = {"step": torch.tensor(float(saved.step)), "exp_avg": average, "exp_avg_sq": square}
