"""The sets of a pool in memory, and single sets that come from a file or go to one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from exporters.errors import SwquantError
from exporters.pool_file import BASE, PoolFile, StoredSet, pool_path
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.pool import base_of, open_set
from swquant.output.destination import write_whole, writing

__all__ = ["check_there", "export_set", "import_set", "read_pool"]


def read_pool(checkpoint: CompressedCheckpoint) -> dict[str, StoredSet]:
    """All sets of a checkpoint's pool, `base` among them; none where it has no pool. Raises SwquantError."""
    found = {}
    pool = checkpoint.manifest.get("pool")
    for name in () if pool is None else (BASE, *pool["sets"]):
        with open_set(checkpoint.folder, checkpoint.manifest, name, checkpoint.name) as file:
            found[name] = file.whole()
    return found


def export_set(checkpoint: CompressedCheckpoint, of_set: str, out: Path, *, overwrite: bool = False) -> None:
    """Copy a set into a file of its own, which `import_set` takes into the pool of another checkpoint of the same base.
    Raises SwquantError."""
    check_there(checkpoint, of_set)
    if out.is_dir() or (out.exists() and not overwrite):
        raise SwquantError(f"{out}: exists already; add --overwrite, or choose another OUT")
    if os.path.lexists(out) and not _is_set(out):
        raise SwquantError(f"{out}: no set that swquant wrote, so it is not replaced; give another OUT")
    if not out.parent.is_dir():
        raise SwquantError(f"{out}: there is no folder {out.parent}; make it first")
    content = (checkpoint.folder / pool_path(of_set)).read_bytes()
    with writing(out, len(content)):
        write_whole(out, content)


def _is_set(path: Path) -> bool:
    """Whether a file is what `export_set` writes."""
    with suppress(SwquantError, OSError):
        if path.is_file() and not path.is_symlink():
            with PoolFile(path):
                return True
    return False


def import_set(checkpoint: CompressedCheckpoint, sets: Mapping[str, StoredSet], path: Path) -> StoredSet:
    """A set from a file. sets: those that are there. Raises SwquantError unless it was trained over this base, and is
    new to its pool."""
    if not path.is_file():
        raise SwquantError(f"{path}: no such file; give one that --export-set wrote")
    with PoolFile(path) as file:
        stored = file.whole()
    if stored.base != base_of(checkpoint.manifest["files"]):
        raise SwquantError(f"{path}: was trained over another base, its fingerprint says; a set fits its own base only")
    tasks = {task for there in sets.values() for task in there.keys}
    if stored.name in (BASE, *sets) or tasks & set(stored.keys):
        raise SwquantError(f"{path}: the set {stored.name} or a task of it is there already; drop that with --drop-set")
    return stored


def check_there(checkpoint: CompressedCheckpoint, of_set: str) -> None:
    """Raise SwquantError where the pool has no such set."""
    pool = checkpoint.manifest.get("pool")
    known = [] if pool is None else list(pool["sets"])
    if of_set not in known:
        raise SwquantError(
            f"{checkpoint.name}: has no set {of_set!r}; it has {', '.join(known) or 'none (swquant adapt makes them)'}"
        )
