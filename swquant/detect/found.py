"""What was found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibrationless import Detection, LinearRecord
from swquant.detect.folds import Fold
from swquant.detect.published import Published
from swquant.models.architecture import Architecture

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """The detection and what it rests on. token_ids: the prompt as the model read it, BOS included where it has one.
    folds: the norms that can take over a scaling of weights, if they were asked for."""

    detection: Detection
    architecture: Architecture
    prompt: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    folds: tuple[Fold, ...] = ()
    published: tuple[Published, ...] = ()

    def record(self, name: str) -> LinearRecord | None:
        """What the probe saw of a stored linear weight; None for an expert that no token visited."""
        probe, weight = self.detection.probe, self.architecture.weights[name]
        return probe.linears.get(weight.watch) if probe is not None else None

    def energy(self, name: str) -> torch.Tensor | None:
        """float32 [in]: the energy of the inputs of a stored linear weight, where it was seen."""
        record = self.record(name)
        return record.energy if record is not None else None
