"""Patches alone: what `tune` writes of a model that is no compressed checkpoint, and that model with them laid over.

    OUT/swquant/manifest.json            which model they belong to, how they were trained; of the kind `patches`
    OUT/swquant/outliers.safetensors     the sets of blocks, as beside a compressed checkpoint
    OUT/README.md                        the card

A few megabytes that mean nothing without their base. A fingerprint tells a folder by its headers, and every model of a
family has the same, so the sha256 of each tensor that is patched is kept, too: over any other weights they are refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from calibrationless import Blocks, Patch, restore
from exporters.errors import CheckpointError, SwquantError
from exporters.sidecar import SIDECAR
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.manifest import MANIFEST, is_patches, read_manifest
from swquant.checkpoints.patch_sets import open_patches

__all__ = ["PatchedCheckpoint", "sha256_of"]


def sha256_of(tensor: torch.Tensor) -> str:
    """Hexadecimal, of the bytes of a tensor."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


class PatchedCheckpoint(Checkpoint):
    """A model with the patches of a folder laid over. base: the model, which is closed with this."""

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self.patches_folder, self.base = folder, base
        manifest = read_manifest(folder)
        if not is_patches(manifest):
            raise SwquantError(f"{folder}: is no folder of patches alone")
        self.manifest = manifest
        self.kind = base.kind  # type: ignore[misc]
        self.name, self.folder = folder.resolve().name, base.folder
        self.config, self.raw_config, self.tensors = base.config, base.raw_config, base.tensors
        self.trust_remote_code = base.trust_remote_code
        self.fingerprint = hashlib.sha256(f"{base.fingerprint} {manifest['digest']}".encode()).hexdigest()
        for tensor, record in manifest["tensors"].items():
            form = base.tensors.get(tensor)
            if form is None or list(form.shape) != record["shape"] or len(form.shape) != 2:
                self._refuse(tensor)
        sidecar = open_patches(folder, manifest, self.name)
        if sidecar is None:
            raise SwquantError(f"{self.name}: holds no patches at all; give {base.name} itself")
        self._sidecar = sidecar

    def _refuse(self, name: str) -> None:
        raise SwquantError(
            f"{self.name}: its patches belong to {self.manifest['source']['name']}, and {name} of {self.base.name} is "
            "another; name the model that was tuned"
        )

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of blocks, in the order in which they are laid over a weight."""
        return tuple(self._sidecar.counts)

    def blocks(self, of_set: str) -> dict[str, Blocks]:
        """Stored name -> blocks of a set."""
        patches = {name: self._sidecar.read(of_set, name, self._shape(name)) for name in self._sidecar.counts[of_set]}
        return cast(dict[str, Blocks], patches)

    def patches(self, name: str) -> tuple[Patch, ...]:
        """What is laid over a tensor. Raises SwquantError where it does not fit."""
        try:
            return self._sidecar.read_all(name, self._shape(name)) if name in self.manifest["tensors"] else ()
        except CheckpointError as error:
            raise SwquantError(f"{error}; fetch it again") from None

    def _shape(self, name: str) -> tuple[int, int]:
        rows, cols = self.base.tensors[name].shape
        return rows, cols

    def read(self, name: str) -> torch.Tensor:
        tensor = self.base.read(name)
        record = self.manifest["tensors"].get(name)
        if record is None:
            return tensor
        if sha256_of(tensor) != record["sha256"]:
            self._refuse(name)
        return restore(tensor.clone(), *self.patches(name))

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, self.patches_folder / MANIFEST, self.patches_folder / SIDECAR)

    @property
    def fills_folder(self) -> bool:
        return self.base.fills_folder

    @property
    def stores_floats(self) -> bool:
        return False

    @property
    def repository(self) -> str | None:
        return self.base.repository

    @property
    def license(self) -> str | None:
        return self.base.license

    @property
    def generation(self) -> dict[str, Any]:
        return self.base.generation

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        return self.base.dense_dtype(stored)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer()

    def save_companions(self, folder: Path) -> None:
        self.base.save_companions(folder)

    def close(self) -> None:
        self._sidecar.close()
        self.base.close()
