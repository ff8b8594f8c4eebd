"""The sidecar: patches that a loader lays over the decoded weights.

`swquant/outliers.safetensors` holds named *sets* of patches, each of one kind of `calibrationless.KINDS`. For every
tensor `X` that a set `S` patches, each part of the kind is stored as `S/X.part`: indices as int32, values in the
original dtype.

    S/X.rows  [n]   S/X.cols  [n]   S/X.values  [n]          kind points

The metadata says what the sets are, in the order in which they are laid over a weight: `{"format": "swquant-patches",
"version": "1", "sets": {"outliers": {"kind": "points", "mode": "replace"}}}`. That set is the only one. Recovery tuning
will add sets of blocks that are added (`"mode": "add"`); a reader refuses sets, kinds, modes and versions that it does
not know, so an old reader can never half-apply a new file.

The file lies in a sub-folder because vLLM reads every safetensors file beside config.json and refuses
names it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrationless import KINDS, Kind, Patch, check_patch, parts_of
from exporters.errors import CheckpointError
from exporters.safetensors_file import FileRecord, SafetensorsReader, SafetensorsWriter

__all__ = ["OUTLIERS", "SETS", "SIDECAR", "PlannedPatch", "SidecarReader", "SidecarWriter"]

SIDECAR = "swquant/outliers.safetensors"
OUTLIERS = "outliers"
# The sets that a compressed checkpoint can have, and their kinds, in the order in which they are laid over a weight.
SETS = {OUTLIERS: "points"}
_FORMAT, _VERSION = "swquant-patches", "1"


@dataclass(frozen=True)
class PlannedPatch:
    """What will be written for one tensor: the patch's set, how many places it has, the [out, in] shape of the weight
    and the dtype of the values."""

    set: str
    tensor: str
    count: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(stored name, dtype, shape) of every part."""
        shapes = KINDS[SETS[self.set]].shapes(self.count, self.shape)
        return [
            (_name(self.set, self.tensor, part), self.dtype if part == "values" else torch.int32, shape)
            for part, shape in shapes.items()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, its header aside."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.layout)


def _description(of_set: str) -> dict[str, str]:
    """What the metadata say of a set."""
    return {"kind": SETS[of_set], "mode": "replace"}


def _name(of_set: str, tensor: str, part: str) -> str:
    return f"{of_set}/{tensor}.{part}"


class SidecarWriter:
    """Streams the announced patches, in their order. begun: see `SafetensorsWriter`, whose methods these are."""

    def __init__(self, path: Path, patches: Sequence[PlannedPatch], *, begun: bool = False) -> None:
        layout = [part for patch in patches for part in patch.layout]
        used = {patch.set for patch in patches}
        sets = {name: _description(name) for name in SETS if name in used}
        metadata = {"format": _FORMAT, "version": _VERSION, "sets": json.dumps(sets)}
        self._writer = SafetensorsWriter(path, layout, metadata, begun=begun)
        self.holds, self.go_on, self.flush = self._writer.holds, self._writer.go_on, self._writer.flush

    def write(self, of_set: str, tensor: str, patch: Patch) -> dict[str, str]:
        """Append the next announced patch. Returns stored name -> sha256 of its parts."""
        return {
            name: self._writer.write(name, value)
            for part, value in parts_of(patch).items()
            for name in [_name(of_set, tensor, part)]
        }

    def finish(self) -> FileRecord:
        return self._writer.finish()

    def close(self) -> None:
        self._writer.close()


class SidecarReader:
    """The patches of each tensor, read when asked for. Raises CheckpointError for a file it does not understand.

    counts: set -> tensor -> number of its places, sets in the order in which they are laid over a weight.
    """

    counts: dict[str, dict[str, int]]

    def __init__(self, path: Path) -> None:
        self._reader = SafetensorsReader(path)
        try:
            self._kinds = _known_sets(path, self._reader.metadata)
            self.counts = {name: {} for name in self._kinds}
            self._understand(path)
        except BaseException:
            self._reader.close()
            raise

    def _understand(self, path: Path) -> None:
        groups: dict[str, set[str]] = {}
        for name in self._reader.entries:
            patched, _, part = name.rpartition(".")
            groups.setdefault(patched, set()).add(part)
        for patched, parts in groups.items():
            of_set, _, tensor = patched.partition("/")
            known = set(self._kinds[of_set].shapes(0, (0, 0))) if of_set in self._kinds else set()
            if parts != known:
                raise CheckpointError(
                    f"{path}: {patched} has the parts {sorted(parts)}, which no set has; fetch it again, or update swquant"
                )
            self.counts[of_set][tensor] = torch.Size(self._reader.entries[_name(of_set, tensor, "cols")].shape).numel()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that have a patch in any set."""
        return tuple(dict.fromkeys(tensor for counts in self.counts.values() for tensor in counts))

    def read(self, of_set: str, tensor: str, shape: tuple[int, int]) -> Patch:
        """The patch of a [out, in] tensor. Raises CheckpointError where it does not fit."""
        kind = self._kinds[of_set]
        parts = (self._reader.read(_name(of_set, tensor, part)) for part in kind.shapes(0, (0, 0)))
        patch = kind.patch(*parts)
        try:
            check_patch(patch, shape, tensor)
        except ValueError as error:
            raise CheckpointError(f"{self._reader.path}: {error}") from None
        return patch

    def read_all(self, tensor: str, shape: tuple[int, int]) -> tuple[Patch, ...]:
        """The patches of all sets, in the order in which they are laid over the weight."""
        return tuple(self.read(of_set, tensor, shape) for of_set, counts in self.counts.items() if tensor in counts)

    def sha256(self) -> str:
        """Hexadecimal sha256 of the file."""
        return self._reader.sha256()

    def close(self) -> None:
        self._reader.close()


def _known_sets(path: Path, metadata: dict[str, str]) -> dict[str, Kind]:
    """Set -> kind, as the metadata of a sidecar says."""
    form = (metadata.get("format"), metadata.get("version"))
    if form != (_FORMAT, _VERSION):
        raise CheckpointError(f"{path}: format {form[0]} {form[1]} is not {_FORMAT} {_VERSION}; update swquant")
    try:
        sets = dict(json.loads(metadata.get("sets", "")).items())
    except (AttributeError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: {str(metadata.get('sets'))[:100]!r} are no patch sets; fetch it again, or update swquant"
        ) from None
    for name, description in sets.items():
        if name not in SETS or description != _description(name):
            raise CheckpointError(
                f"{path}: its patch set {name[:40]!r} is not known to this version, or not in this form; update swquant"
            )
    return {name: KINDS[SETS[name]] for name in sets}
