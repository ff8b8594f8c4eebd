"""The sidecar: patches that a loader lays over the decoded weights.

`swquant/outliers.safetensors` holds, for every patched tensor `X` of a *set* `S`,

    S/X.rows    int32 [n]      output channels
    S/X.cols    int32 [n]      input channels
    S/X.values  [n]            original values, in the original dtype

and says in its metadata what they are: `{"format": "swquant-patches", "version": "1", "sets":
{"S": {"kind": "points", "mode": "replace"}}}`. Today there is one set, `outliers`. Recovery tuning will add sets
of blocks (`"kind": "blocks"`) that are added (`"mode": "add"`); a reader refuses kinds, modes and versions
that it does not know, so an old reader can never half-apply a new file.

The file lies in a sub-folder because vLLM reads every safetensors file beside config.json and refuses
names it does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from calibrationless import Outliers
from exporters.errors import CheckpointError
from exporters.safetensors_file import FileRecord, SafetensorsReader, SafetensorsWriter

__all__ = ["OUTLIERS", "SIDECAR", "SidecarReader", "SidecarWriter", "patch_bytes"]

SIDECAR = "swquant/outliers.safetensors"
OUTLIERS = "outliers"
_FORMAT, _VERSION = "swquant-patches", "1"
_VALUES = (torch.float32, torch.float16, torch.bfloat16)
_SETS = {OUTLIERS: {"kind": "points", "mode": "replace"}}


def _names(tensor: str) -> tuple[str, str, str]:
    return (f"{OUTLIERS}/{tensor}.rows", f"{OUTLIERS}/{tensor}.cols", f"{OUTLIERS}/{tensor}.values")


def patch_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes that `count` points take in the file, its header aside."""
    return count * (8 + dtype.itemsize)


class SidecarWriter:
    """Streams the points of the announced tensors: [(tensor, number of points, dtype of the values)]."""

    def __init__(self, path: Path, counts: Sequence[tuple[str, int, torch.dtype]]) -> None:
        layout = []
        for tensor, count, dtype in counts:
            rows, cols, values = _names(tensor)
            layout += [(rows, torch.int32, (count,)), (cols, torch.int32, (count,)), (values, dtype, (count,))]
        metadata = {"format": _FORMAT, "version": _VERSION, "sets": json.dumps(_SETS)}
        self._writer = SafetensorsWriter(path, layout, metadata)

    def write(self, tensor: str, outliers: Outliers) -> None:
        for name, part in zip(_names(tensor), (outliers.rows, outliers.cols, outliers.values), strict=True):
            self._writer.write(name, part)

    def finish(self) -> FileRecord:
        return self._writer.finish()

    def close(self) -> None:
        self._writer.close()


class SidecarReader:
    """The points of each tensor, read when asked for. Raises CheckpointError for a file it does not understand."""

    def __init__(self, path: Path) -> None:
        self._reader = SafetensorsReader(path)
        metadata = self._reader.metadata
        try:
            self._understand(path, metadata)
        except BaseException:
            self._reader.close()
            raise

    def _understand(self, path: Path, metadata: dict[str, str]) -> None:
        form = (metadata.get("format"), metadata.get("version"))
        if form != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path}: format {form[0]} {form[1]} is not {_FORMAT} {_VERSION}; update swquant")
        try:
            sets = json.loads(metadata.get("sets", ""))
        except (ValueError, TypeError, RecursionError):
            sets = None
        if sets != _SETS:
            raise CheckpointError(
                f"{path}: patch sets {metadata.get('sets')} are not known to this version; update swquant"
            )
        groups: dict[str, set[str]] = {}
        for name in self._reader.entries:
            patched, _, part = name.rpartition(".")
            groups.setdefault(patched, set()).add(part)
        prefix = f"{OUTLIERS}/"
        for patched, parts in groups.items():
            if not patched.startswith(prefix) or parts != {"rows", "cols", "values"}:
                raise CheckpointError(f"{path}: {patched} has the parts {sorted(parts)}, not rows, cols and values")
        self.tensors = tuple(patched.removeprefix(prefix) for patched in groups)

    @property
    def counts(self) -> dict[str, int]:
        """Tensor -> number of its points."""
        return {tensor: math.prod(self._reader.entries[_names(tensor)[0]].shape) for tensor in self.tensors}

    def read(self, tensor: str) -> Outliers:
        """The points of a tensor. Raises CheckpointError where they are malformed; their range is the caller's to check."""
        rows, cols, values = (self._reader.read(name) for name in _names(tensor))
        one_each = rows.ndim == 1 and rows.shape == cols.shape == values.shape
        if (
            not one_each
            or rows.dtype is not torch.int32
            or cols.dtype is not torch.int32
            or values.dtype not in _VALUES
        ):
            raise CheckpointError(f"{self._reader.path}: the points of {tensor} do not belong together")
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self._reader.path}: an outlier of {tensor} is NaN or infinite")
        return Outliers(rows, cols, values)

    def close(self) -> None:
        self._reader.close()
