"""The model under study, in memory as float32, with what detection found in it and the text it is measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import SuperWeight, Watch
from swquant.checkpoints.base import Checkpoint
from swquant.detect.found import Found
from swquant.evaluate.pipeline import Windows
from swquant.models.architecture import LinearKind

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """quick: measure less. bits: of the rounding experiments."""

    checkpoint: Checkpoint
    found: Found
    model: PreTrainedModel
    windows: Windows
    bits: int = 4
    quick: bool = False

    @property
    def super_weights(self) -> tuple[SuperWeight, ...]:
        return self.found.detection.super_weights

    def watch(self, name: str) -> Watch:
        return next(watch for watch in self.found.architecture.watches if watch.name == name)

    def down(self, name: str) -> Tensor:
        """[out, in] view of a watched down projection: what is written there changes the model."""
        watch = self.watch(name)
        parameter = self.model.get_submodule(watch.module).get_parameter(watch.parameter).detach()
        weight = parameter if watch.expert is None else parameter[watch.expert]
        return weight.T if watch.transposed else weight

    def matrices(self) -> Iterator[Tensor]:
        """[out, in] views of every linear weight of the decoder layers, each expert's slice for itself."""
        seen = set()
        for linear in self.found.architecture.weights.values():
            if (linear.module, linear.parameter) in seen:
                continue
            seen.add((linear.module, linear.parameter))
            module = self.model.get_submodule(linear.module)
            parameter = module.get_parameter(linear.parameter).detach()
            if parameter.ndim == 3:
                yield from (weight.T if getattr(module, "is_transposed", False) else weight for weight in parameter)
            else:
                yield parameter.T if linear.transposed else parameter

    def energies(self) -> dict[int, Tensor]:
        """Address of each of these matrices -> energy of its inputs on the prompt, float32 [in]. Experts that no token
        visited have none."""
        energies: dict[int, Tensor] = {}
        for linear in self.found.architecture.weights.values():
            parameter = self.model.get_submodule(linear.module).get_parameter(linear.parameter)
            slices = [parameter] if parameter.ndim == 2 else list(parameter)
            for index, weight in enumerate(slices):
                watch = f"{linear.name}[{index}]" if linear.kind is LinearKind.FUSED else linear.watch
                record = self.found.probe.linears.get(watch)
                if record is not None and linear.expert in (None, index):
                    energies[weight.data_ptr()] = record.energy
        return energies

    @property
    def weights(self) -> int:
        """Number of linear weights in the decoder layers."""
        return sum(matrix.numel() for matrix in self.matrices())

    def fingerprint(self) -> str:
        """sha256 over all that a measurement depends on, every weight included: a file may change under its name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        known = [
            self.model.config.to_dict(),
            [ids.tolist() for ids in self.windows.ids],
            self.windows.bos,
            [asdict(weight.scalar) for weight in self.super_weights],
            self.checkpoint.kind,
            self.model.device.type,
        ]
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
        return digest.hexdigest()
