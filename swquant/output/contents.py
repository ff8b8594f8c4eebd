"""What lies in a folder, and whether all of it is ours.

Seen is everything that a person would lose with the folder: files, links (also those to folders, which are not entered)
and folders with nothing in them.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from exporters.errors import SwquantError
from exporters.text import shown
from swquant.checkpoints.manifest import MANIFEST, read_manifest

__all__ = ["contents", "remove_all_but", "size_of", "strangers", "why_not_ours"]


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


def remove_all_but(names: Collection[str], folder: Path) -> None:
    """Remove all files below `folder` but those with these names. Folders stay. Raises OSError."""
    for name in contents(folder) - set(names):
        if not name.endswith("/"):
            (folder / name).unlink()


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`, 0 where there is none."""
    return sum((folder / name).lstat().st_size for name in contents(folder)) if folder.is_dir() else 0


def strangers(folder: Path) -> list[str] | None:
    """What lies in `folder` beside the files that swquant put there, by what it writes last; None where there is no
    such thing. Raises SwquantError where it cannot be relied on, OSError where nobody can look."""
    if not (folder / MANIFEST).is_file():
        return None
    return sorted(contents(folder) - {MANIFEST, *read_manifest(folder)["files"]})


def why_not_ours(folder: Path) -> str | None:
    """Why `folder` may not be replaced; None if it is empty, or swquant made it and everything in it."""
    only = "--overwrite replaces only checkpoints of swquant"
    try:
        others = strangers(folder) if folder.is_dir() else None
        if others is None:
            empty = folder.is_dir() and not any(folder.iterdir())
            return None if empty else f"exists and is not a checkpoint; {only}"
    except OSError as error:
        return f"exists and cannot be looked into ({error.strerror}); {only}"
    except SwquantError:
        return (
            f"exists, but its {MANIFEST} cannot be relied on (see swquant verify); move it away, or delete it yourself"
        )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"holds {shown(others[0])}{more}, which swquant did not put there; move that elsewhere, or give another OUT"
        )
    return None
