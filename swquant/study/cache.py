"""Measurements on disk, so that a second run repeats nothing: one safetensors file each, named by a hash of all that it
depends on.

A file that is damaged or lacks something is measured again. Nothing else is ever read from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from swquant.output.destination import write_whole

__all__ = ["Cache"]

# Of the measurements themselves: a change of method makes old files useless.
_VERSION = 1


class Cache:
    """fingerprint: of model and text (see `Subject.fingerprint`)."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{_VERSION} {self.fingerprint} {key}".encode()).hexdigest()
        return self.folder / f"{name}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was kept under a key, None where there is nothing of use."""
        try:
            return load(self._path(key).read_bytes())
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a key. The file appears whole or not at all."""
        write_whole(self._path(key), save({name: tensor.contiguous() for name, tensor in tensors.items()}))
