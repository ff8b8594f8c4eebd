"""`verify`: read every byte of a compressed checkpoint again and hold it against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from exporters.errors import CheckpointError, SwquantError
from exporters.safetensors_file import FileRecord, SafetensorsReader
from exporters.sidecar import SIDECAR, SidecarReader
from swquant.checkpoints.manifest import MANIFEST, read_manifest
from swquant.checkpoints.patch_sets import uncounted
from swquant.checkpoints.schema import FileEntry, Manifest

__all__ = ["file_table", "verify"]


def _sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_table(folder: Path, known: Mapping[str, FileRecord] = MappingProxyType({})) -> dict[str, FileEntry]:
    """The manifest's `files`: name -> bytes and sha256 of everything in a folder. known: those hashed already."""
    table: dict[str, FileEntry] = {}
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(paths.items()):
        record = known.get(name)
        table[name] = {
            "bytes": record.nbytes if record else path.stat().st_size,
            "sha256": record.sha256 if record else _sha256(path),
        }
    return table


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; an empty list if nothing is.

    Checked: the manifest's own digest, that exactly the listed files exist, the sha256 of every file and every tensor,
    that every tensor lies in the file that is said to hold it, and the sidecar's coordinates. Raises SwquantError where
    there is no manifest to hold anything against.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    listed = manifest["files"]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    problems += [f"{name}: listed in the manifest, but not there" for name in sorted(set(listed) - present)]
    problems += [f"{name}: there, but not listed in the manifest" for name in sorted(present - set(listed))]
    for name in sorted(present & set(listed)):
        try:
            problems += _verify_file(folder / name, name, manifest)
        except OSError as error:  # a link to nothing, no permission, a bad sector
            problems.append(f"{name}: cannot be read ({error.strerror})")
    return problems


def _verify_file(path: Path, name: str, manifest: Manifest) -> list[str]:
    listed, size = manifest["files"][name], path.stat().st_size
    if size != listed["bytes"]:
        return [f"{name}: {size} bytes, the manifest says {listed['bytes']}"]
    if name.endswith(".safetensors"):
        return _verify_weights(path, name, manifest)
    return [] if _sha256(path) == listed["sha256"] else [f"{name}: its sha256 is not the manifest's"]


def _verify_weights(path: Path, name: str, manifest: Manifest) -> list[str]:
    if _sha256(path) != manifest["files"][name]["sha256"]:
        return [f"{name}: its sha256 is not the manifest's" + _damaged_tensor(path, name, manifest)]
    try:
        if name == SIDECAR:
            return _verify_sidecar(path, manifest)
        with SafetensorsReader(path) as reader:
            promised = {
                part for record in manifest["tensors"].values() if record["file"] == name for part in record["sha256"]
            }
            if promised != set(reader.entries):
                odd = sorted(promised ^ set(reader.entries))[0]
                return [f"{name}: {odd} is in one of file and manifest only"]
    except SwquantError as error:
        return [str(error)]
    return []


def _damaged_tensor(path: Path, name: str, manifest: Manifest) -> str:
    """Which tensor of a damaged file is damaged, where that can be told."""
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


def _verify_sidecar(path: Path, manifest: Manifest) -> list[str]:
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
