"""A compressed checkpoint again, with some of its tensors or patches changed: what `tune` and `merge` write.

    parts   stored name -> tensor, of the form that it has: new codes, new scales
    patches set -> tensor -> patch: put in the place of the one that is there, or over all others where the set is new
    without sets that are left out
    files   name -> content, of other files that change

Every other tensor and every other file but the card is byte for byte the old one. The manifest's hashes, counts and
sums follow by themselves; what they cannot know (how it was trained, what it cost) the caller says. OUT appears whole
or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from calibrationless import Patch
from exporters.safetensors_file import SafetensorsReader, SafetensorsWriter
from exporters.sidecar import SETS, SIDECAR, PlannedPatch, SidecarReader, SidecarWriter
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import content_of, write_manifest
from swquant.checkpoints.patch_sets import open_patches
from swquant.checkpoints.schema import CheckpointContent, CheckpointManifest
from swquant.output.card import write_card
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import check_result, file_table
from swquant.progress import Progress, silent

__all__ = ["Changes", "rewrite"]

_Sides = dict[tuple[str, str], PlannedPatch]


@dataclass(frozen=True)
class Changes:
    """What is to be changed: see above. records: tensor -> keys of its record; content: keys of the manifest,
    None for one that goes."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Mapping[str, Mapping[str, Patch]] = field(default_factory=dict)
    without: Collection[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def rewrite(
    checkpoint: CompressedCheckpoint,
    out: Path,
    changes: Changes,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CheckpointManifest:
    """Write `checkpoint` with the changes into OUT and verify it. Returns its manifest. Raises SwquantError; then `out`
    does not exist, or is what it was."""
    check_destination(out, overwrite, checkpoint)
    size = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
    size += sum(patch.values.nbytes for of_set in changes.patches.values() for patch in of_set.values())
    check_space(out, size)
    with writing(out, size), unfinished(out) as folder:
        hashes = dict(_copied(checkpoint, folder, changes))
        before, after = _write_sidecar(checkpoint, folder, changes)
        content = _content(checkpoint, folder, changes, hashes, before, after)
        manifest = write_manifest(folder, content)
        check_result(folder, out, progress)
        replace(folder, out, overwrite)
    return manifest


def _copied(
    checkpoint: CompressedCheckpoint, folder: Path, changes: Changes
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Every file but the sidecar, with changed parts. Gives (shard, sha256 of its parts) of shards that changed."""
    parts = changes.parts
    for name in dict.fromkeys((*checkpoint.manifest["files"], *changes.files)):
        old, new = checkpoint.folder / name, folder / name
        if name == SIDECAR:
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        if name in changes.files:
            new.write_bytes(changes.files[name])
            continue
        if parts and name.endswith(".safetensors"):
            with SafetensorsReader(old) as reader:
                if not parts.keys().isdisjoint(reader.entries):
                    yield name, _shard(reader, new, parts)
                    continue
        shutil.copyfile(old, new)


def _shard(reader: SafetensorsReader, path: Path, parts: Mapping[str, Tensor]) -> Mapping[str, str]:
    """A shard with other parts. Returns the sha256 of all."""
    layout = [(name, entry.dtype, entry.shape) for name, entry in reader.entries.items()]
    with closing(SafetensorsWriter(path, layout, reader.metadata)) as writer:
        for name in reader.entries:
            writer.write(name, parts[name] if name in parts else reader.read(name))
        return writer.finish().tensors


def _write_sidecar(checkpoint: CompressedCheckpoint, folder: Path, changes: Changes) -> tuple[_Sides, _Sides]:
    """The old patches that stay, and the new ones. Returns what the old sidecar held and what the new one holds, by set
    and tensor; without patches there is no sidecar."""
    shapes = {
        name: (record["shape"][0], record["shape"][-1]) for name, record in checkpoint.manifest["tensors"].items()
    }
    old = open_patches(checkpoint.folder, checkpoint.manifest, checkpoint.name)
    try:
        there = [] if old is None else [(of_set, name) for of_set, names in old.counts.items() for name in names]
        before = {
            (of_set, name): _planned(of_set, name, _read(old, of_set, name, shapes), shapes) for of_set, name in there
        }
        given = {
            (of_set, name): patch for of_set, patches in changes.patches.items() for name, patch in patches.items()
        }
        stay = [place for place in before if place[0] not in changes.without]
        after = {place: before[place] for place in stay}
        after |= {place: _planned(*place, patch, shapes) for place, patch in given.items()}
        order = sorted(after, key=lambda place: place[0] not in SETS)  # otherwise old ones first
        if not order:
            return before, after
        (folder / SIDECAR).parent.mkdir(exist_ok=True)
        with closing(SidecarWriter(folder / SIDECAR, [after[place] for place in order])) as writer:
            for place in order:
                writer.write(*place, given[place] if place in given else _read(old, *place, shapes))
            writer.finish()
        return before, after
    finally:
        if old is not None:
            old.close()


def _read(old: SidecarReader | None, of_set: str, name: str, shapes: Mapping[str, tuple[int, int]]) -> Patch:
    assert old is not None
    return old.read(of_set, name, shapes[name])


def _planned(of_set: str, tensor: str, patch: Patch, shapes: Mapping[str, tuple[int, int]]) -> PlannedPatch:
    side = patch.values.shape[-1] if patch.values.ndim > 1 else 1
    return PlannedPatch(of_set, tensor, len(patch), shapes[tensor], patch.values.dtype, side, patch.mode)


def _content(
    checkpoint: CompressedCheckpoint,
    folder: Path,
    changes: Changes,
    hashes: Mapping[str, Mapping[str, str]],
    before: _Sides,
    after: _Sides,
) -> CheckpointContent:
    """The old manifest's content, with all that changed."""
    content = content_of(checkpoint.manifest)
    tensors: dict[str, Any] = {}
    for name, record in checkpoint.manifest["tensors"].items():
        entry: dict[str, Any] = {**record, **changes.records.get(name, {})}
        if of_shard := hashes.get(record["file"]):
            entry["sha256"] = {part: of_shard[part] for part in record["sha256"]}
        counts = {of_set: patch.count for (of_set, tensor), patch in after.items() if tensor == name}
        entry |= {of_set: counts.get(of_set, 0) for of_set in SETS if of_set in entry}
        entry.pop("blocks", None)
        if blocks := {of_set: count for of_set, count in counts.items() if of_set not in SETS}:
            entry["blocks"] = blocks
        tensors[name] = entry
    totals = checkpoint.manifest["totals"].copy()
    more = sum(patch.nbytes for patch in after.values()) - sum(patch.nbytes for patch in before.values())
    bits = totals["bits_per_quantized_weight"] + 8 * more / max(totals["quantized_weights"], 1)
    totals["bits_per_quantized_weight"] = round(bits, 4)
    for gone in [key for key, value in changes.content.items() if value is None]:
        content.pop(gone, None)
    given = {key: value for key, value in changes.content.items() if value is not None}
    made = cast(CheckpointContent, {**content, "tensors": tensors, "totals": totals, **given})
    write_card(folder, checkpoint, made)
    made["files"] = file_table(folder)
    totals["bytes"] = sum(entry["bytes"] for entry in made["files"].values())
    return made
