"""The plan of a student: which layers stay, what it will take to teach it, and whether there is room. Nothing is
loaded, so `auto` is known by its number only.

What training takes is counted: of every trained weight its value, gradient and two moments in float32, three more
copies while a look ahead is taken, one while a learning rate is looked for, and the teacher beside them. How long it
takes is guessed: a step's products at the speed that one product has here. That is a lower bound; attention, norms and
the loss come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.distill.options import DistillOptions
from swquant.distill.student import StudentCheckpoint, cut_names, layer_list
from swquant.models.architecture import describe
from swquant.models.devices import device_for
from swquant.models.memory import available_memory
from swquant.pr_moe import PrMoeConfig
from swquant.training.data import Corpus, text_windows
from swquant.units import human_bytes

__all__ = ["DistillPlan", "make_plan"]

_COPIES, _AHEAD = 4, 4
_SIDE = 1024  # of the product that is timed


@dataclass(frozen=True)
class DistillPlan:
    """layers: the teacher's, by name. keep: those that stay, ascending; None where that is found out. given: the text
    to learn on, None for the teacher's own. weights, nbytes: (teacher, student), the student's about where its layers
    are found out. memory: bytes that teaching takes. device: where everything runs."""

    teacher: Checkpoint
    options: DistillOptions
    layers: tuple[str, ...]
    keep: tuple[int, ...] | None
    given: Corpus | None
    weights: tuple[int, int]
    nbytes: tuple[int, int]
    memory: int
    device: torch.device

    @property
    def count(self) -> int:
        """How many layers stay."""
        return self.options.count_of(len(self.layers)) if self.keep is None else len(self.keep)

    @property
    def tokens(self) -> int:
        """That the student reads while it learns."""
        return self.options.steps * self.options.batch * self.options.window

    @cached_property
    def seconds(self) -> float:
        """Of the steps, at least: three passes of the student and, while the stage may last, one of the teacher."""
        until = self.options.stage(self.options.steps)
        taught = self.options.steps if until is None else until
        teacher, student = self.weights
        products = 2 * self.tokens * (3 * student + teacher * taught / max(self.options.steps, 1))
        return products / _speed(self.device)


def make_plan(
    teacher: Checkpoint, options: DistillOptions, *, text: tuple[str, str] | None = None, device: str = "auto"
) -> DistillPlan:
    """text: (name, content) to learn on. Raises SwquantError for everything that is known before the model is loaded:
    layers that there are not, a text too short, too little memory."""
    _refuse(teacher)
    if text is not None and not options.steps:
        raise SwquantError("--text is learned on with --steps; give both, or neither")
    layers = tuple(describe(teacher).layers)
    keep = options.listed(len(layers))
    count = options.count_of(len(layers)) if keep is None else len(keep)
    given = None if text is None else text_windows(teacher, text[1], options.window, text[0])
    if given is not None:
        given.split()  # refuses a single window
    sizes = {name: form.numel for name, form in teacher.tensors.items()}
    stored = {name: teacher.dense_dtype(form).itemsize * form.numel for name, form in teacher.tensors.items()}
    stem = layer_list(teacher, layers)
    weights, nbytes = ((sum(of.values()), _left(of, stem, keep, count, len(layers))) for of in (sizes, stored))
    if keep is not None:
        StudentCheckpoint(teacher, keep, layers)  # refuses layers that would become others
    memory = _memory(weights, options)
    place = _place(teacher, device_for(device), memory)
    return DistillPlan(teacher, options, layers, keep, given, weights, nbytes, memory, place)


def _refuse(teacher: Checkpoint) -> None:
    """Raise SwquantError for a model that has no students."""
    if teacher.is_compressed:
        raise SwquantError(f"{teacher.name}: compressed; distill the original, then compress the student")
    composite = teacher.config.get_text_config() is not teacher.config
    if composite and not isinstance(teacher.config, PrMoeConfig):
        raise SwquantError(f"{teacher.name}: a model of several parts; distill takes the text model alone")


def _left(of: Mapping[str, int], stem: str, keep: Sequence[int] | None, count: int, depth: int) -> int:
    """What is left of a sum (stored name -> size) when layers go; of layers that are not known yet, by their mean."""
    kept = sum(of[name] for name in cut_names(tuple(of), stem, keep or ()).values())
    return kept if keep is not None else kept + (sum(of.values()) - kept) * count // depth


def _memory(weights: tuple[int, int], options: DistillOptions) -> int:
    """Bytes, in float32."""
    teacher, student = weights
    if not options.steps:
        return 4 * (teacher + student)
    ahead = _AHEAD if options.stage(1) is None else 0
    look = 1 if options.rate is None else 0
    return 4 * (teacher + student * (_COPIES + max(ahead, look)))


def _place(teacher: Checkpoint, device: torch.device, memory: int) -> torch.device:
    """The device, or the CPU where it has too little room. Raises SwquantError where that has not enough either."""
    if device.type != "cpu" and memory <= torch.cuda.mem_get_info(device)[0]:
        return device
    if memory > available_memory():
        raise SwquantError(
            f"{teacher.name}: teacher and student take {human_bytes(memory)} of memory, {human_bytes(available_memory())} are "
            "free; close other programs, or use a larger machine"
        )
    return CPU


def _speed(device: torch.device) -> float:
    """Operations in a second, of one product in float32."""
    a = torch.ones(_SIDE, _SIDE, device=device)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return 2 * _SIDE**3 / best
