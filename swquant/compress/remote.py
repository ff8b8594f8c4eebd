"""Tensors rounded by other processes: each worker opens the source itself and reads the weights that it is given.

What comes back is the value that the same function gives here, so the writer does not know who made it. A worker whose
version, libraries or processor differ could round otherwise; it refuses, in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from calibrationless import CPU, Evidence
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.cluster.workers import Team, WorkersError
from swquant.compress.plan import TensorPlan
from swquant.compress.resuming import machine
from swquant.models.converted import as_built
from swquant.version import __version__

__all__ = ["Source", "check_workers", "made_there", "source_of", "task_bytes"]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Source:
    """What a worker opens, and what it must find there. made_with: version, processor and libraries of this process."""

    path: str
    trust_remote_code: bool
    fingerprint: str
    made_with: tuple[tuple[str, str], ...]


def _made_with() -> tuple[tuple[str, str], ...]:
    return (("swquant", __version__), *machine().items())


def source_of(checkpoint: Checkpoint) -> Source:
    """Of an open checkpoint: a folder, or a .gguf file."""
    path = checkpoint.files[0] if checkpoint.kind == "gguf" else checkpoint.folder
    return Source(str(path.resolve()), checkpoint.trust_remote_code, checkpoint.fingerprint, _made_with())


@lru_cache(maxsize=1)
def _opened(source: Source) -> Checkpoint:
    """The source as a worker sees it. Raises WorkersError where it is another."""
    theirs, mine = dict(source.made_with), dict(_made_with())
    for name, wanted in theirs.items():
        if mine[name] != wanted:
            raise WorkersError(
                f"a worker has {name} {mine[name]}, this process {wanted}; the same is needed everywhere"
            )
    if not Path(source.path).exists():
        raise WorkersError(f"a worker cannot see {source.path}; put the model on storage that all machines share")
    checkpoint = as_built(open_checkpoint(source.path, trust_remote_code=source.trust_remote_code))
    if checkpoint.fingerprint != source.fingerprint:
        raise WorkersError(f"a worker sees another model at {source.path}; put the same there on all machines")
    return checkpoint


def _sees(source: Source) -> str:
    """Runs on every machine before the work."""
    return _opened(source).fingerprint


def check_workers(team: Team, checkpoint: Checkpoint) -> None:
    """Raise SwquantError where a machine has another swquant, or cannot see the model."""
    team.everywhere(_sees, source_of(checkpoint))


def made_there(
    shared: tuple[Source, Callable[[TensorPlan, Tensor, Evidence, torch.device], Made]],
    plan: TensorPlan,
    evidence: Evidence,
) -> Made:
    """What a function, `round_tensor` for one, makes of a tensor, with the weight read by the worker."""
    source, make = shared
    return make(plan, _opened(source).read(plan.name), evidence, CPU)


def task_bytes(task: tuple[TensorPlan, Evidence]) -> int:
    """What a task and its result take on their way."""
    plan, evidence = task
    known = (evidence.importance, evidence.energy, *(evidence.factor or ()))
    return plan.nbytes + plan.sidecar_bytes + sum(tensor.nbytes for tensor in known if tensor is not None)
