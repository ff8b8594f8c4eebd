"""What a detection hands on: the super weights with their evidence, and what it rests on.

A type alone, one floor below those who make it (`pipeline`) and those who use it (`compress`, `study`, `terminal`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from calibrationless import Detection, LinearRecord, Probe
from swquant.detect.folds import Fold
from swquant.detect.published import Published
from swquant.models.architecture import Architecture

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """The detection and what it rests on. probe: what the first pass of the prompt showed. token_ids: the prompt as the
    model read it, BOS included where it has one. folds: the norms that can take over a scaling of weights, if they were
    asked for. model: the checkpoint's name.

    unseen: stored linear weights whose product the prompt does not reach (cross attention, for example), and experts of
    a projection that was not seen through any expert; an expert that no token visited is not among them.
    unseen_layers: layers in which no product of a down projection was seen, so that nothing was looked for there."""

    detection: Detection
    probe: Probe = field(compare=False, repr=False)
    architecture: Architecture
    prompt: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    published: tuple[Published, ...] = ()
    model: str = ""
    unseen: tuple[str, ...] = ()
    unseen_layers: tuple[int, ...] = ()

    def record(self, name: str) -> LinearRecord | None:
        """What the probe saw of a stored linear weight, or of the output head; None for an expert that no token
        visited."""
        weight = self.architecture.weights.get(name)
        return self.probe.linears.get(name if weight is None else weight.watch)

    def energy(self, name: str) -> torch.Tensor | None:
        """float32 [in]: the energy of the inputs of a stored linear weight, where it was seen."""
        record = self.record(name)
        return record.energy if record is not None else None
