"""The pool of a compressed checkpoint: sets of blocks that are alternatives, one of which is laid when it is chosen.

`swquant adapt` makes them; each serves one task or several. A set is bound to its base, that is, to all files of the
checkpoint but those of the pool: a set that was trained over another base is refused, not laid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from calibrationless import Blocks
from exporters.errors import CheckpointError, SwquantError
from exporters.pool_file import BASE, POOL, PoolFile, pool_path
from swquant.checkpoints.origin import CARD
from swquant.checkpoints.pool_schema import PoolRecord
from swquant.checkpoints.schema import CheckpointManifest, FileEntry, Manifest

__all__ = ["AUTO", "ChosenSet", "base_of", "open_set", "pool_file_problem", "pool_of", "set_of"]

AUTO = "auto"


def base_of(files: Mapping[str, FileEntry]) -> str:
    """The fingerprint of what sets lie over: sha256 of the names and hashes of all files but the pool's, and the card,
    which whoever publishes a folder may rewrite."""
    kept = (name for name in files if not name.startswith(f"{POOL}/") and name != CARD)
    hashes = {name: files[name]["sha256"] for name in kept}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def pool_of(manifest: Manifest, name: str) -> PoolRecord:
    """The pool's record. name: of the checkpoint. Raises SwquantError where it has none."""
    found: PoolRecord | None = manifest.get("pool")  # type: ignore[assignment]
    if found is None:
        raise SwquantError(f"{name}: has no pool of tasks to choose from; make one: swquant adapt CHECKPOINT OUT")
    return found


def set_of(manifest: Manifest, task: str, name: str) -> str | None:
    """The set that serves a task, None for `base`. Raises SwquantError for a task that there is none of."""
    pool = pool_of(manifest, name)
    if task == BASE:
        return None
    found = next((of_set for of_set, record in pool["sets"].items() if task in record["tasks"]), None)
    if found is None:
        known = [task for record in pool["sets"].values() for task in record["tasks"]]
        raise SwquantError(f"{name}: has no task {task!r}; it has {', '.join([*known, BASE])}, and {AUTO} chooses")
    return found


def open_set(folder: Path, manifest: CheckpointManifest, of_set: str, name: str) -> PoolFile:
    """The file of a set, or of `base`, which belongs to this checkpoint. Its bytes are held against the manifest only
    by `ChosenSet`, and by `verify`. Raises SwquantError."""
    path = pool_path(of_set)
    if not (folder / path).is_file() or path not in manifest["files"]:
        raise SwquantError(f"{name}: {path} is missing; fetch it again")
    file = PoolFile(folder / path)
    if problem := _foreign(file, of_set, manifest):
        file.close()
        raise SwquantError(f"{name}: {path}: {problem}; fetch it again")
    return file


def _foreign(file: PoolFile, of_set: str, manifest: Manifest) -> str | None:
    """Why a file is not the one that the manifest names, None if it is."""
    pool = pool_of(manifest, of_set)
    if file.base != base_of(manifest["files"]) or file.base != pool["base"]:
        return "belongs to another base, its fingerprint says"
    if file.name != of_set:
        return f"is the set {file.name[:40]!r}"
    if of_set != BASE and file.record != pool["sets"].get(of_set):
        return "its record is not the manifest's"
    return None


def pool_file_problem(file: PoolFile, of_set: str, manifest: Manifest) -> str | None:
    """What is wrong with a file of a pool, read whole, beside its manifest; None if nothing is."""
    if problem := _foreign(file, of_set, manifest):
        return problem
    try:
        for weight in file.weights:
            record = manifest["tensors"].get(weight)
            if record is None or len(record["shape"]) != 2:
                return f"{weight} is no matrix of the checkpoint"
            file.blocks(weight, (record["shape"][0], record["shape"][1]))
        file.whole()
    except CheckpointError as error:
        return str(error)
    return None


class ChosenSet:
    """The blocks of one set, read when a weight asks for them. Raises SwquantError where the file is not what was
    written."""

    def __init__(self, folder: Path, manifest: CheckpointManifest, of_set: str, name: str) -> None:
        self.name = of_set
        self._file = open_set(folder, manifest, of_set, name)
        if self._file.sha256() != manifest["files"][pool_path(of_set)]["sha256"]:
            self.close()
            raise SwquantError(f"{name}: {pool_path(of_set)} is not what was written, its sha256 says; fetch it again")
        self.weights = frozenset(self._file.weights)

    def blocks(self, weight: str, shape: tuple[int, int]) -> tuple[Blocks, ...]:
        """What is laid over a weight: its blocks, or nothing."""
        return (self._file.blocks(weight, shape),) if weight in self.weights else ()

    def close(self) -> None:
        self._file.close()
