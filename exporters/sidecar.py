"""The sidecar: patches that a loader lays over the decoded weights.

`swquant/outliers.safetensors` holds named *sets* of patches, each of one kind of `calibrationless.KINDS` and one mode
(`replace`, `add`). For every tensor `X` that a set `S` patches, each part of the kind is stored as `S/X.part`: indices
as int32, values as floats.

    S/X.rows  [n]   S/X.cols  [n]   S/X.values  [n]          kind points
    S/X.rows  [n]   S/X.cols  [n]   S/X.values  [n, B, B]    kind blocks

The metadata says what the sets are, in the order in which they are laid over a weight: `{"format": "swquant-patches",
"version": "1", "sets": {"outliers": {"kind": "points", "mode": "replace"}, "tuned": {"kind": "blocks", "mode":
"add"}}}`. The set `outliers` comes first and is as shown; sets of blocks have any other name. A reader refuses sets,
kinds, modes and versions that it does not know, so an old reader can never half-apply a new file.

The file lies in a sub-folder because vLLM reads every safetensors file beside config.json and refuses
names it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrationless import KINDS, Kind, Patch, check_patch, parts_of
from exporters.errors import CheckpointError
from exporters.safetensors_file import FileRecord, SafetensorsReader, SafetensorsWriter

__all__ = ["OUTLIERS", "SETS", "SIDECAR", "PlannedPatch", "SidecarReader", "SidecarWriter", "set_problem"]

SIDECAR = "swquant/outliers.safetensors"
OUTLIERS = "outliers"
# The sets whose names say what they hold: kind and mode. They lie under all others.
SETS = {OUTLIERS: ("points", "replace")}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_FORMAT, _VERSION = "swquant-patches", "1"


@dataclass(frozen=True)
class PlannedPatch:
    """What will be written for one tensor: the patch's set, how many places it has, the [out, in] shape of the weight
    and the dtype of the values; for sets of blocks also their side and mode."""

    set: str
    tensor: str
    count: int
    shape: tuple[int, int]
    dtype: torch.dtype
    side: int = 1
    mode: str = "add"

    @property
    def form(self) -> tuple[str, str]:
        """(kind, mode)."""
        return SETS.get(self.set, ("blocks", self.mode))

    @property
    def layout(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(stored name, dtype, shape) of every part."""
        shapes = KINDS[self.form[0]].shapes(self.count, self.shape, self.side)
        return [
            (_name(self.set, self.tensor, part), self.dtype if part == "values" else torch.int32, shape)
            for part, shape in shapes.items()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, its header aside."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in self.layout)


def set_problem(name: str) -> str | None:
    """Why a set of blocks cannot have this name, None where it can."""
    if name in SETS:
        return f"{name!r} is the name of another set"
    return None if _NAME.fullmatch(name) else f"{name[:40]!r} is not made of a to z, 0 to 9, _ and - alone"


def _name(of_set: str, tensor: str, part: str) -> str:
    return f"{of_set}/{tensor}.{part}"


class SidecarWriter:
    """Streams the announced patches, in their order. begun: see `SafetensorsWriter`, whose methods these are."""

    def __init__(self, path: Path, patches: Sequence[PlannedPatch], *, begun: bool = False) -> None:
        layout = [part for patch in patches for part in patch.layout]
        forms = {patch.set: patch.form for patch in patches}
        order = sorted(forms, key=lambda name: name not in SETS)  # otherwise as announced
        sets = {name: dict(zip(("kind", "mode"), forms[name], strict=True)) for name in order}
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

    counts: set -> tensor -> number of its places, sets in the order in which they are laid over a weight. forms: set ->
    (kind, mode).
    """

    counts: dict[str, dict[str, int]]
    forms: dict[str, tuple[str, str]]

    def __init__(self, path: Path) -> None:
        self._reader = SafetensorsReader(path)
        try:
            self.forms = _known_sets(path, self._reader.metadata)
            self.counts = {name: {} for name in self.forms}
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
            known = set(self._kind(of_set).shapes(0, (0, 0), 1)) if of_set in self.forms else set()
            if parts != known:
                raise CheckpointError(
                    f"{path}: {patched} has the parts {sorted(parts)}, which no set has; fetch it again, or update swquant"
                )
            self.counts[of_set][tensor] = torch.Size(self._reader.entries[_name(of_set, tensor, "cols")].shape).numel()

    def _kind(self, of_set: str) -> Kind:
        return KINDS[self.forms[of_set][0]]

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that have a patch in any set."""
        return tuple(dict.fromkeys(tensor for counts in self.counts.values() for tensor in counts))

    def read(self, of_set: str, tensor: str, shape: tuple[int, int]) -> Patch:
        """The patch of a [out, in] tensor. Raises CheckpointError where it does not fit."""
        kind = self._kind(of_set)
        parts = (self._reader.read(_name(of_set, tensor, part)) for part in kind.shapes(0, (0, 0), 1))
        patch = kind.patch(*parts, mode=self.forms[of_set][1])
        try:
            check_patch(patch, shape, tensor)
        except ValueError as error:
            raise CheckpointError(f"{self._reader.path}: {error}") from None
        return patch

    def read_all(self, tensor: str, shape: tuple[int, int], *without: str | None) -> tuple[Patch, ...]:
        """The patches of all sets, in the order in which they are laid over the weight. without: names of sets that are
        left out."""
        sets = (of_set for of_set, counts in self.counts.items() if tensor in counts and of_set not in without)
        return tuple(self.read(of_set, tensor, shape) for of_set in sets)

    def sha256(self) -> str:
        """Hexadecimal sha256 of the file."""
        return self._reader.sha256()

    def close(self) -> None:
        self._reader.close()


def _known_sets(path: Path, metadata: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Set -> (kind, mode), as the metadata of a sidecar says."""
    form = (metadata.get("format"), metadata.get("version"))
    if form != (_FORMAT, _VERSION):
        raise CheckpointError(f"{path}: format {form[0]} {form[1]} is not {_FORMAT} {_VERSION}; update swquant")
    try:
        sets = dict(json.loads(metadata.get("sets", "")).items())
    except (AttributeError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: {str(metadata.get('sets'))[:100]!r} are no patch sets; fetch it again, or update swquant"
        ) from None
    forms: dict[str, tuple[str, str]] = {}
    for name, description in sets.items():
        known = [SETS[name]] if name in SETS else [("blocks", mode) for mode in KINDS["blocks"].modes]
        found = next((form for form in known if description == {"kind": form[0], "mode": form[1]}), None)
        if found is None or (name not in SETS and set_problem(name)):
            raise CheckpointError(
                f"{path}: its patch set {name[:40]!r} is not known to this version, or not in this form; update swquant"
            )
        forms[name] = found
    return forms
