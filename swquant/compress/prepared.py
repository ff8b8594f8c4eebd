"""What is known before anything is written, and how what is written is made of it: tensor by tensor, here or elsewhere.

Whoever writes takes the tensors from `in_order` and does not know who made them: this process, a GPU, or the workers of
a team. What makes one (`tensor.round_tensor` for a checkpoint, `export.gguf.tensors.made` for a file) is a function of
the tensor's plan, its weight and the evidence alone, importable by name where the workers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from calibrationless import CPU, Evidence
from swquant.checkpoints.base import Checkpoint
from swquant.cluster.workers import Team
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.remote import made_there, source_of, task_bytes
from swquant.detect.found import Found
from swquant.progress import Bar

__all__ = ["Prepared", "in_order"]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Prepared:
    """device: where weights are rounded. team: who rounds the tensors; None: this process."""

    checkpoint: Checkpoint
    found: Found
    plan: Plan
    low_memory: bool = False
    device: torch.device = CPU
    team: Team | None = None


def in_order(
    prepared: Prepared,
    tensors: Iterable[TensorPlan],
    make: Callable[[TensorPlan, Tensor, Evidence, torch.device], Made],
    evidence: Callable[[TensorPlan], Evidence],
    bar: Bar,
) -> Iterator[tuple[TensorPlan, Made]]:
    """Tensors and what `make` gives of each, in their order; without a team one is in memory at a time. evidence: is
    asked of each in turn, as the text of a model that goes through it layer by layer wants it."""
    if prepared.team is not None:
        tasks = ((tensor, evidence(tensor)) for tensor in tensors)
        shared = (source_of(prepared.checkpoint), make)
        for (tensor, _), made in prepared.team.in_order(made_there, shared, tasks, task_bytes):
            bar.advance(tensor.name, tensor.source.nbytes)
            yield tensor, made
        return
    for tensor in tensors:
        bar.advance(tensor.name, tensor.source.nbytes)
        # No name for the weight, nor for what is made: it would live on beside the next one.
        yield tensor, make(tensor, prepared.checkpoint.read(tensor.name), evidence(tensor), prepared.device)
