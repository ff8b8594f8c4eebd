"""A checkpoint with one more set of blocks: every file as it was, but sidecar, manifest and card, written anew.

OUT appears whole or not at all. The shards, config.json and the tokenizer are byte for byte the old ones, so a loader
that knows no sidecar sees the checkpoint that was trained on, and the older sets lie under the new one as before.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from calibrationless import Blocks
from exporters.errors import SwquantError
from exporters.sidecar import SIDECAR, PlannedPatch, SidecarReader, SidecarWriter, set_problem
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import write_manifest
from swquant.checkpoints.patch_sets import counted, open_patches
from swquant.checkpoints.schema import CheckpointContent, CheckpointManifest, TuningRecord
from swquant.output.card import write_card
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import file_table, verify
from swquant.progress import Progress, silent

__all__ = ["free_name", "write_patched"]

_SEAL = ("format", "version", "digest")


def free_name(manifest: CheckpointManifest, wanted: str = "tuned") -> str:
    """A name for a set that no set has yet: `tuned`, `tuned-2`, … Raises SwquantError for one that no set can have."""
    if problem := set_problem(wanted):
        raise SwquantError(f"a set of blocks cannot be called so: {problem}")
    taken, number, name = counted(manifest), 1, wanted
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def write_patched(
    checkpoint: CompressedCheckpoint,
    out: Path,
    of_set: str,
    blocks: Mapping[str, Blocks],
    record: TuningRecord,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CheckpointManifest:
    """Write `checkpoint` with a set of blocks (stored name -> blocks, in the order of the tensors) into OUT.

    record: how they were trained, for the manifest. Returns that. Raises SwquantError; then `out` does not exist, or is
    what it was.
    """
    check_destination(out, overwrite, checkpoint)
    old = checkpoint.folder
    size = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values()) + record["bytes"]
    check_space(out, size)
    with writing(out, size), unfinished(out) as folder:
        for name in checkpoint.manifest["files"]:
            if name != SIDECAR:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(old / name, folder / name)
        (folder / SIDECAR).parent.mkdir(exist_ok=True)
        _write_sidecar(checkpoint, folder / SIDECAR, of_set, blocks)
        manifest = write_manifest(folder, _content(checkpoint, folder, of_set, blocks, record))
        with progress.step("Verifying every byte"):
            problems = verify(folder)
        if problems:
            raise SwquantError(f"{out}: the result does not verify ({problems[0]}); is the disk sound?")
        replace(folder, out, overwrite)
    return manifest


def _write_sidecar(checkpoint: CompressedCheckpoint, path: Path, of_set: str, blocks: Mapping[str, Blocks]) -> None:
    """The old sets, patch by patch, and the new one over them."""
    manifest = checkpoint.manifest
    shapes = {name: (record["shape"][0], record["shape"][-1]) for name, record in manifest["tensors"].items()}
    old = open_patches(checkpoint.folder, manifest, checkpoint.name)
    try:
        planned = [] if old is None else [_planned(old, name, tensor, shapes[tensor]) for name, tensor in _old(old)]
        planned += [
            PlannedPatch(of_set, name, len(patch), shapes[name], patch.values.dtype, patch.side, patch.mode)
            for name, patch in blocks.items()
        ]
        writer = SidecarWriter(path, planned)
        try:
            for name, tensor in [] if old is None else _old(old):
                assert old is not None
                writer.write(name, tensor, old.read(name, tensor, shapes[tensor]))
            for name, patch in blocks.items():
                writer.write(of_set, name, patch)
            writer.finish()
        finally:
            writer.close()
    finally:
        if old is not None:
            old.close()


def _old(sidecar: SidecarReader) -> list[tuple[str, str]]:
    return [(of_set, tensor) for of_set, counts in sidecar.counts.items() for tensor in counts]


def _planned(sidecar: SidecarReader, of_set: str, tensor: str, shape: tuple[int, int]) -> PlannedPatch:
    patch = sidecar.read(of_set, tensor, shape)
    side = patch.values.shape[-1] if patch.values.ndim > 1 else 1
    return PlannedPatch(of_set, tensor, len(patch), shape, patch.values.dtype, side, patch.mode)


def _content(
    checkpoint: CompressedCheckpoint, folder: Path, of_set: str, blocks: Mapping[str, Blocks], record: TuningRecord
) -> CheckpointContent:
    """The old manifest's content, with the set counted and in all sums."""
    content: dict[str, Any] = {key: value for key, value in checkpoint.manifest.items() if key not in _SEAL}
    tensors = dict(checkpoint.manifest["tensors"])
    for name, patch in blocks.items():
        counts = {**tensors[name].get("blocks", {}), of_set: len(patch)}
        tensors[name] = cast(Any, {**tensors[name], "blocks": counts})
    totals = checkpoint.manifest["totals"].copy()
    more = 8 * record["bytes"] / max(totals["quantized_weights"], 1)
    totals["bits_per_quantized_weight"] = round(totals["bits_per_quantized_weight"] + more, 4)
    tuned = {**checkpoint.manifest.get("tuned", {}), of_set: record}
    made = cast(CheckpointContent, {**content, "tensors": tensors, "totals": totals, "tuned": tuned})
    write_card(folder, checkpoint, made)
    made["files"] = file_table(folder)
    totals["bytes"] = sum(entry["bytes"] for entry in made["files"].values())
    return made
