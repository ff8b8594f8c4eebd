"""`verify`: read every byte of a checkpoint, an export or patches alone again, and hold it against the manifest.

A hash only says that a file is the one that the manifest lists. So what a loader would refuse (scales that are not
finite, shapes that contradict each other, outliers that lie outside) is looked for, too, by the functions that loaders
call: a checkpoint that verifies can be loaded. What was exported is for other programs, which have checks of their own:
there it is hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from exporters.errors import CheckpointError, SwquantError
from exporters.json_file import json_bytes
from exporters.pool_file import POOL, PoolFile
from exporters.safetensors_file import FileRecord, SafetensorsReader
from exporters.sidecar import SIDECAR, SidecarReader
from exporters.text import shown
from swquant.checkpoints.manifest import MANIFEST, is_checkpoint, is_patches, read_manifest
from swquant.checkpoints.origin import CARD
from swquant.checkpoints.patch_sets import counted, uncounted
from swquant.checkpoints.pool import pool_file_problem
from swquant.checkpoints.schema import CheckpointManifest, FileEntry, Manifest, PatchesManifest
from swquant.checkpoints.stored import check_stored
from swquant.output.contents import contents, is_ordinary, ordinary_problems, sha256_of_file
from swquant.progress import Progress

__all__ = ["check_result", "file_table", "verify"]


def file_table(folder: Path, known: Mapping[str, FileRecord] = MappingProxyType({})) -> dict[str, FileEntry]:
    """The manifest's `files`: name -> bytes and sha256 of everything in a folder. known: those hashed already."""
    table: dict[str, FileEntry] = {}
    for name in sorted(name for name in contents(folder) if not name.endswith("/")):
        path, record = folder / name, known.get(name)
        table[name] = {
            "bytes": record.nbytes if record else path.stat().st_size,
            "sha256": record.sha256 if record else sha256_of_file(path),
        }
    return table


def verify(folder: Path) -> list[str]:
    """What is wrong with what swquant wrote into a folder, one sentence each; an empty list if nothing is.

    Checked: the manifest's own digest and bytes, that exactly the listed files exist and nothing else, the sha256 of
    every file (of README.md, which may be rewritten, only that it is there) and every tensor, that every tensor lies in
    the file that is said to hold it, and what a loader would refuse of weights and sidecar. Raises SwquantError where
    there is no manifest to hold anything against.
    """
    if is_ordinary(folder):
        return ordinary_problems(folder)
    manifest = read_manifest(folder)
    problems: list[str] = []
    try:
        problems += _verify_manifest(folder, manifest)
        present = contents(folder) - {MANIFEST}
    except OSError as error:
        return [*problems, f"{shown(error.filename or folder)}: cannot be read ({error.strerror})"]
    listed = manifest["files"]
    problems += [f"{shown(name)}: listed in the manifest, but not there" for name in sorted(set(listed) - present)]
    problems += [_unlisted(folder, name) for name in sorted(present - set(listed))]
    if counted(manifest) and SIDECAR not in listed:
        problems.append(f"{SIDECAR}: holds patches that the manifest counts, but is not listed in it")
    for name in sorted(present & set(listed)):
        try:
            problems += _verify_file(folder / name, name, manifest)
        except OSError as error:  # a link to nothing, no permission, a bad sector
            problems.append(f"{shown(name)}: cannot be read ({error.strerror})")
    return problems


def check_result(folder: Path, out: Path, progress: Progress) -> None:
    """Raise SwquantError where a folder that is to become `out` is not what was written."""
    with progress.step("Verifying every byte"):
        problems = verify(folder)
    if problems:
        raise SwquantError(f"{out}: the result does not verify ({problems[0]}); is the disk sound?")


def _verify_manifest(folder: Path, manifest: Manifest) -> list[str]:
    """Its digest is over what it says; its bytes could differ still: spaces, a key twice, a number in another form."""
    try:
        if (folder / MANIFEST).read_bytes() == json_bytes(manifest):
            return []
    except UnicodeError:  # half of a surrogate pair
        pass
    return [f"{MANIFEST}: says what was written in other bytes; it was changed or written anew, fetch it again"]


def _unlisted(folder: Path, name: str) -> str:
    if name.endswith("/"):
        return f"{shown(name)}: an empty folder, which is not part of the checkpoint"
    if (folder / name).is_symlink() and (folder / name).is_dir():
        return f"{shown(name)}: a link to a folder, which no checkpoint has; put the files themselves there"
    return f"{shown(name)}: there, but not listed in the manifest"


def _verify_file(path: Path, name: str, manifest: Manifest) -> list[str]:
    listed, size = manifest["files"][name], path.stat().st_size
    if name == CARD:  # a text for people, which they may rewrite; nothing loads it
        return []
    if size != listed["bytes"]:
        return [f"{name}: {size} bytes, the manifest says {listed['bytes']}"]
    if name.endswith(".safetensors") and (is_checkpoint(manifest) or is_patches(manifest)):
        return _verify_weights(path, name, manifest)
    return [] if sha256_of_file(path) == listed["sha256"] else [f"{name}: its sha256 is not the manifest's"]


def _verify_weights(path: Path, name: str, manifest: CheckpointManifest | PatchesManifest) -> list[str]:
    if sha256_of_file(path) != manifest["files"][name]["sha256"]:
        return [f"{name}: its sha256 is not the manifest's" + _damaged_tensor(path, name, manifest)]
    try:
        if name == SIDECAR:
            return _verify_sidecar(path, manifest)
        if not is_checkpoint(manifest):
            return [f"{name}: patches alone have no such file"]
        if name.startswith(f"{POOL}/"):
            with PoolFile(path) as file:
                problem = pool_file_problem(file, path.stem, manifest)
            return [f"{name}: {problem}"] if problem else []
        with SafetensorsReader(path) as reader:
            records = {tensor: record for tensor, record in manifest["tensors"].items() if record["file"] == name}
            promised = {part for record in records.values() for part in record["sha256"]}
            if promised != set(reader.entries):
                odd = sorted(promised ^ set(reader.entries))[0]
                return [f"{name}: {shown(odd)} is in one of file and manifest only"]
            problems = []
            for tensor, record in records.items():
                try:
                    check_stored(tensor, record, reader)
                except CheckpointError as error:
                    problems.append(f"{name}: {error}")
            return problems
    except SwquantError as error:
        return [str(error)]


def _damaged_tensor(path: Path, name: str, manifest: CheckpointManifest | PatchesManifest) -> str:
    """Which tensor of a damaged file is damaged, where that can be told."""
    if not is_checkpoint(manifest):  # of its own tensors it has no hashes
        return ""
    try:
        with SafetensorsReader(path) as reader:
            for tensor, record in manifest["tensors"].items():
                for part, expected in record["sha256"].items() if record["file"] == name else ():
                    if (
                        part in reader.entries
                        and hashlib.sha256(reader.read_bytes(part).numpy().data).hexdigest() != expected
                    ):
                        return f" ({part} of {tensor} differs)"
    except CheckpointError as error:
        return f" ({error})"
    return ""


def _verify_sidecar(path: Path, manifest: CheckpointManifest | PatchesManifest) -> list[str]:
    sidecar = SidecarReader(path)
    try:
        odd = uncounted(sidecar, manifest)
        problems = [f"{SIDECAR}: does not hold the {odd} that the manifest counts"] if odd is not None else []
        for name in sidecar.tensors:
            shape = manifest["tensors"][name]["shape"] if name in manifest["tensors"] else []
            if len(shape) != 2:
                problems.append(f"{SIDECAR}: {name} is no matrix of the manifest")
                continue
            try:
                sidecar.read_all(name, (shape[0], shape[1]))
            except CheckpointError as error:
                problems.append(str(error))
        return problems
    finally:
        sidecar.close()
