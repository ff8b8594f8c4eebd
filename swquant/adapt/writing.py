"""A checkpoint with a pool: every file as it was, and one file for each set beside the sidecar.

OUT appears whole or not at all. No byte of the base changes, so a loader that knows no pool, and every set that was
trained before, sees what it saw.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace as changed
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from calibrationless.subspaces import ranks
from exporters.pool_file import BASE, POOL, StoredSet, pool_path, write_pool_file
from swquant.adapt.spaces import columns_of
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import content_of, write_manifest
from swquant.checkpoints.pool import base_of
from swquant.checkpoints.pool_schema import PoolRecord
from swquant.checkpoints.schema import CheckpointContent, CheckpointManifest
from swquant.models.architecture import LinearWeight, describe
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import check_result, file_table
from swquant.progress import Progress, silent
from swquant.units import short

__all__ = ["angle_between", "write_pool"]


def write_pool(
    checkpoint: CompressedCheckpoint,
    out: Path,
    sets: Mapping[str, StoredSet],
    limit: float,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CheckpointManifest:
    """Write `checkpoint` with these sets as its pool, `base` among them, in place of the one that it has. limit: of the
    base's key. No set but `base`: without a pool. Raises SwquantError; then `out` does not exist, or is what it was."""
    check_destination(out, overwrite, checkpoint)
    manifest = checkpoint.manifest
    base = base_of(manifest["files"])
    kept = {name: entry for name, entry in manifest["files"].items() if not name.startswith(f"{POOL}/")}
    sets = {name: changed(stored, base=base) for name, stored in sets.items()} if len(sets) > 1 else {}
    size = sum(entry["bytes"] for entry in kept.values())
    size += sum(tensor.nbytes for stored in sets.values() for tensor in stored.tensors().values())
    check_space(out, size)
    with writing(out, size), unfinished(out) as folder:
        for name in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, folder / name)
        for name, stored in sets.items():
            (folder / POOL).mkdir(parents=True, exist_ok=True)
            write_pool_file(folder / pool_path(name), stored)
        content = content_of(manifest)
        content.pop("pool", None)
        files = file_table(folder)
        totals = {**manifest["totals"], "bytes": sum(entry["bytes"] for entry in files.values())}
        content |= {"files": files, "totals": totals}
        if sets:
            content["pool"] = _record(checkpoint, base, sets, limit)
        written = write_manifest(folder, cast(CheckpointContent, content))
        check_result(folder, out, progress)
        replace(folder, out, overwrite)
    return written


def _record(checkpoint: CompressedCheckpoint, base: str, sets: Mapping[str, StoredSet], limit: float) -> PoolRecord:
    grown = {name: stored for name, stored in sets.items() if name != BASE}
    weights = describe(checkpoint).weights
    angles = {
        f"{one} {other}": angle
        for one, other in combinations(grown, 2)
        if (angle := angle_between(grown[one], grown[other], weights)) is not None
    }
    records = {name: cast(Any, stored.record) for name, stored in grown.items()}
    return {"base": base, "limit": short(limit), "sets": records, "angles": angles}


def angle_between(one: StoredSet, other: StoredSet, weights: Mapping[str, LinearWeight]) -> float | None:
    """Degrees between what the tasks of two sets made the same inputs see: 0 where one space holds the other, 90 where
    nothing is common; None where no input is."""
    common = smaller = 0.0
    for name in set(one.seen) & set(other.seen):
        ours, theirs = (columns_of(stored.blocks[name], weights[name]).tolist() for stored in (one, other))
        for column in set(ours) & set(theirs):
            first, second = one.seen[name][ours.index(column)], other.seen[name][theirs.index(column)]
            common += float((first.double().mT @ second.double()).square().sum())
            smaller += min(int(ranks(first)), int(ranks(second)))
    return short(math.degrees(math.acos(min(math.sqrt(common / smaller), 1.0))), 4) if smaller else None
