"""One set of a pool as a file: blocks that are laid over decoded weights when the set is chosen, and what it knows.

A pool is a folder of such files beside the sidecar, `swquant/pool/NAME.safetensors`. Its sets are alternatives: unlike
the sidecar's, none is laid unless somebody asks for it, and a file is read when it is needed. Everything that belongs
to a set is in its file, so a set is copied by copying that:

    blocks/X.rows  [n]   blocks/X.cols  [n]   blocks/X.values  [n, B, B]     added to the weight X, as in the sidecar
    seen/X  [k, B, r]   own/X  [k, B, q]     what the tasks of the set, and the base's own text, made the input of X
                                             see: bases (`calibrationless.subspaces`) of its k column blocks that
                                             blocks read, in ascending order
    key/T  [2, d]                            of a task: mean and spread of its features
    text   [n, length]                       the base's own text (of the file `base` alone, which has no blocks)

The metadata names the base that the set lies over, by a fingerprint, and holds the set's record as JSON. A reader
refuses formats, versions and parts that it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from calibrationless import Blocks, check_patch, parts_of
from exporters.errors import CheckpointError
from exporters.safetensors_file import FileRecord, SafetensorsReader, SafetensorsWriter

__all__ = ["BASE", "POOL", "PoolFile", "StoredSet", "pool_path", "write_pool_file"]

POOL = "swquant/pool"
BASE = "base"
_FORMAT, _VERSION = "swquant-set", "1"
_PARTS = ("rows", "cols", "values")
_NAME = re.compile(r"blocks/.+\.(rows|cols|values)|(seen|own|key)/.+|text")


@dataclass(frozen=True)
class StoredSet:
    """Everything that a file holds. base: the fingerprint of what it lies over. record: JSON. Other fields as above, by
    stored name of the weight or by task."""

    name: str
    base: str
    record: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Blocks] = field(default_factory=dict)
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    text: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Stored name -> tensor."""
        found = {
            f"blocks/{name}.{part}": tensor
            for name, blocks in self.blocks.items()
            for part, tensor in parts_of(blocks).items()
        }
        for kind, group in (("seen", self.seen), ("own", self.own), ("key", self.keys)):
            found |= {f"{kind}/{name}": tensor for name, tensor in group.items()}
        return found if self.text is None else {**found, "text": self.text}

    @staticmethod
    def of(name: str, base: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredSet:
        """From what `tensors` gave."""
        groups: dict[str, dict[str, Tensor]] = {"blocks": {}, "seen": {}, "own": {}, "key": {}}
        for stored, tensor in tensors.items():
            kind, _, local = stored.partition("/")
            if local:
                groups[kind][local] = tensor
        weights = dict.fromkeys(local.rpartition(".")[0] for local in groups["blocks"])
        found = groups["blocks"]
        blocks = {
            weight: Blocks(found[f"{weight}.rows"], found[f"{weight}.cols"], found[f"{weight}.values"])
            for weight in weights
        }
        return StoredSet(name, base, record, blocks, groups["seen"], groups["own"], groups["key"], tensors.get("text"))


def pool_path(name: str) -> str:
    """Where a set lies in a checkpoint."""
    return f"{POOL}/{name}.safetensors"


def write_pool_file(path: Path, content: StoredSet) -> FileRecord:
    """Write a set. Returns size and hashes."""
    tensors = content.tensors()
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": content.name,
        "base": content.base,
        "record": json.dumps(content.record, allow_nan=False),
    }
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(path, layout, metadata)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish()
    finally:
        writer.close()


class PoolFile:
    """A set that is read part by part. Raises CheckpointError for a file that it does not understand."""

    name: str
    base: str
    record: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = SafetensorsReader(path)
        try:
            self._understand()
        except BaseException:
            self._reader.close()
            raise

    def _understand(self) -> None:
        metadata = self._reader.metadata
        form = (metadata.get("format"), metadata.get("version"))
        if form != (_FORMAT, _VERSION):
            raise CheckpointError(
                f"{self.path}: format {form[0]} {form[1]} is not {_FORMAT} {_VERSION}; give a set of a pool, or update "
                "swquant"
            )
        try:
            self.name, self.base = metadata["name"], metadata["base"]
            self.record = json.loads(metadata["record"])
        except (KeyError, ValueError, RecursionError):
            raise CheckpointError(f"{self.path}: does not say what it holds; fetch it again") from None
        odd = next((name for name in self._reader.entries if not _NAME.fullmatch(name)), None)
        parts = {weight: [f"blocks/{weight}.{part}" for part in _PARTS] for weight in self.weights}
        lost = next((part for named in parts.values() for part in named if part not in self._reader.entries), None)
        if odd or lost:
            what = f"holds {str(odd)[:80]!r}, which no set has" if odd else f"lacks {lost}"
            raise CheckpointError(f"{self.path}: {what}; fetch it again, or update swquant")

    @property
    def weights(self) -> tuple[str, ...]:
        """Stored names of the weights that have blocks."""
        named = (name.removeprefix("blocks/") for name in self._reader.entries if name.startswith("blocks/"))
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in named))

    def blocks(self, weight: str, shape: tuple[int, int]) -> Blocks:
        """Those of a [out, in] weight. Raises CheckpointError where they do not fit it."""
        rows, cols, values = (self._reader.read(f"blocks/{weight}.{part}") for part in _PARTS)
        blocks = Blocks(rows, cols, values)
        try:
            check_patch(blocks, shape, weight)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return blocks

    def keys(self) -> dict[str, Tensor]:
        """Task -> float32 [2, d]. Raises CheckpointError for what is none."""
        return {name.removeprefix("key/"): self._floats(name, 2) for name in self._named("key/")}

    def whole(self) -> StoredSet:
        """All of it. Raises CheckpointError; that the blocks fit their weights is not looked at."""
        for name in (*self._named("seen/"), *self._named("own/")):
            self._floats(name, 3)
        self.keys()
        tensors = {name: self._reader.read(name) for name in self._reader.entries}
        return StoredSet.of(self.name, self.base, self.record, tensors)

    def sha256(self) -> str:
        """Hexadecimal sha256 of the file."""
        return self._reader.sha256()

    def _named(self, beginning: str) -> list[str]:
        return [name for name in self._reader.entries if name.startswith(beginning)]

    def _floats(self, name: str, dimensions: int) -> Tensor:
        tensor = self._reader.read(name)
        if tensor.dtype != torch.float32 or tensor.ndim != dimensions or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.path}: {name} is not a finite float32 tensor of {dimensions} dimensions")
        return tensor

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
