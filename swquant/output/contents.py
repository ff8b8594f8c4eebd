"""What lies in a folder, and whether all of it is ours.

Seen is everything that a person would lose with the folder: files, links (also those to folders, which are not entered)
and folders with nothing in them.

What has a manifest is ours by the names that it lists. An ordinary model folder (of `distill`, `moe`, `merge --base`)
is made to be trained further by others, who save into it under the same names: beside it lies a list with hashes
(`FILES`), and it is ours only as long as every file is as it was written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from exporters.errors import CheckpointError, SwquantError
from exporters.json_file import read_json, write_json
from exporters.text import shown
from swquant.checkpoints.manifest import MANIFEST, read_manifest

__all__ = [
    "FILES",
    "contents",
    "is_ordinary",
    "may_be_ours",
    "ordinary_problems",
    "remove_all_but",
    "sha256_of_file",
    "size_of",
    "strangers",
    "why_not_ours",
    "write_files",
]

FILES = "swquant/files.json"
_FORMAT = "swquant-files-1"


def contents(folder: Path) -> set[str]:
    """Names below `folder`, with slashes; those of empty folders end in one. Raises OSError where it cannot look."""

    def fail(error: OSError) -> None:
        raise error

    names: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=fail):
        below = Path(root).relative_to(folder)
        links = (name for name in folders if Path(root, name).is_symlink())
        names |= {(below / name).as_posix() for name in (*files, *links)}
        if not folders and not files and below != Path():
            names.add(f"{below.as_posix()}/")
    return names


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_files(folder: Path) -> None:
    """List all files of an ordinary model folder that is finished, with their sha256."""
    listed = {name: sha256_of_file(folder / name) for name in sorted(contents(folder) - {FILES})}
    write_json(folder / FILES, {"format": _FORMAT, "files": listed})


def _listed(folder: Path) -> Mapping[str, str]:
    """Name -> sha256, as `write_files` wrote it."""
    content = read_json(folder / FILES)
    files = content.get("files")
    if content.get("format") != _FORMAT or not isinstance(files, dict):
        raise CheckpointError(f"{folder / FILES}: not a list of files of this version")
    return files


def remove_all_but(names: Collection[str], folder: Path) -> None:
    """Remove all files below `folder` but those with these names. Folders stay. Raises OSError."""
    for name in contents(folder) - set(names):
        if not name.endswith("/"):
            (folder / name).unlink()


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, 0 where there is none."""
    return sum((folder / name).lstat().st_size for name in contents(folder)) if folder.is_dir() else 0


def is_ordinary(folder: Path) -> bool:
    """Whether it is an ordinary model folder that swquant wrote."""
    return not (folder / MANIFEST).is_file() and (folder / FILES).is_file()


def ordinary_problems(folder: Path) -> list[str]:
    """What is not as `write_files` found it, one sentence each. Raises SwquantError for a list that is none, and
    OSError."""
    there, listed = contents(folder) - {FILES}, _listed(folder)
    problems = [f"{shown(name)}: listed in {FILES}, but not there" for name in sorted(set(listed) - there)]
    return problems + [f"{shown(name)}: not as it was written" for name in strangers(folder) or ()]


def strangers(folder: Path) -> list[str] | None:
    """What lies in `folder` that swquant did not put there, or not as it is, by what it writes last; None where there
    is no such thing. Raises SwquantError where it cannot be relied on, OSError where nobody can look."""
    if (folder / MANIFEST).is_file():
        return sorted(contents(folder) - {MANIFEST, *read_manifest(folder)["files"]})
    if not (folder / FILES).is_file():
        return None
    there, ours = contents(folder) - {FILES}, _listed(folder)
    same = {name for name in there & set(ours) if _is_file_with(folder / name, ours[name])}
    return sorted(there - same)


def _is_file_with(path: Path, sha256: object) -> bool:
    """Whether a path is a file, and no link to one, of that content."""
    return path.is_file() and not path.is_symlink() and sha256_of_file(path) == sha256


def may_be_ours(folder: Path) -> bool:
    """Whether it is worth asking `why_not_ours`, which may read every byte."""
    if (folder / MANIFEST).is_file() or (folder / FILES).is_file():
        return True
    with suppress(OSError):
        return not any(folder.iterdir())
    return False


def why_not_ours(folder: Path) -> str | None:
    """Why `folder` may not be replaced; None if it is empty, or swquant made it and everything in it."""
    only = "--overwrite replaces only what it made"
    try:
        others = strangers(folder) if folder.is_dir() else None
        if others is None:
            empty = folder.is_dir() and not any(folder.iterdir())
            return None if empty else f"exists and was not made by swquant; {only}"
    except OSError as error:
        return f"exists and cannot be looked into ({error.strerror}); {only}"
    except SwquantError:
        what = f"{MANIFEST} cannot be relied on (see swquant verify)"
        if not (folder / MANIFEST).is_file():
            what = f"{FILES} cannot be relied on"
        return f"exists, but its {what}; move it away, or delete it yourself"
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        so = "" if (folder / MANIFEST).is_file() else " as it is"
        return f"holds {shown(others[0])}{more}, which swquant did not put there{so}; move that elsewhere, or give another OUT"
    return None
