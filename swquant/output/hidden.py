"""Hidden names beside OUT: what is being made, who is still making it, and what a run that was killed left there.

    .NAME.partial-1a2b3c4d     what is not finished, a folder or a file; the old OUT, while it is deleted
    .NAME.replaced-1a2b3c4d    the old OUT between two renames, where the system cannot exchange two folders in one
    .NAME.unfinished-1a2b3c4d  what an interrupted run can be taken up from (`resumable`)

Whoever makes one holds a lock on it (`flock`), which the kernel lets go of when the process ends, however it ends. So
the next run that writes into the same parent can tell the dead from the living, and removes the dead: those that have
such a name, belong to this user and are not locked. An old OUT that a killed run had moved aside gets its name back,
and what can be taken up stays.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporters.errors import SwquantError
from swquant.interrupts import uninterrupted
from swquant.output.contents import strangers
from swquant.output.journal import read_journal
from swquant.scratch import lock, same

__all__ = [
    "JOURNAL",
    "foreign",
    "forget",
    "hidden_name",
    "left_name",
    "locked_file",
    "locked_folder",
    "remove_dead",
    "visible",
    "worth_keeping",
]

JOURNAL = "journal.jsonl"
_PATTERN = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced|unfinished)-[0-9a-f]{8}", re.DOTALL)
_LONGEST = 100  # bytes of a name that are repeated; file systems allow 143 to 255 for the whole
_TRIES = 100


def _hidden(path: Path, kind: str, digits: str) -> Path:
    name = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{name}.{kind}-{digits}")


def hidden_name(path: Path, kind: str = "partial") -> Path:
    """A new name beside `path`, which exists nowhere yet."""
    return _hidden(path, kind, secrets.token_hex(4))


def left_name(path: Path) -> Path:
    """Where an interrupted run leaves what `path` will become: always the same."""
    return _hidden(path, "unfinished", hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8])


def worth_keeping(folder: Path) -> bool:
    """Whether a run can be taken up from a folder: its journal has a step, and there is something that it is about."""
    with suppress(OSError):
        return len(read_journal(folder / JOURNAL)) > 1 and any(path.is_dir() for path in folder.iterdir())
    return False


def forget(folder: Path) -> None:
    """No run takes up what is in this folder any more, if one could have."""
    if (match := _PATTERN.fullmatch(folder.name)) and match["kind"] == "unfinished":
        (folder / JOURNAL).unlink(missing_ok=True)


def foreign(folder: Path) -> str | None:
    """Something that swquant did not put into a hidden folder: whoever was killed while OUT was exchanged left the old
    one there, and it was looked at only before. None where all is ours."""
    for inner in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
        with suppress(SwquantError):  # killed while it was written, or deleted
            if others := strangers(inner):
                return (inner / others[0]).relative_to(folder).as_posix()
    return None


def visible(path: Path) -> Path:
    """What a path inside something hidden will become part of: OUT, which the user knows. Other paths as they are."""
    for index, part in enumerate(path.parts):
        if match := _PATTERN.fullmatch(part):
            return Path(*path.parts[:index], match["name"])
    return path


def _opened(path: Path, flags: int) -> int | None:
    """Open and lock something new. None where another run found it before it was locked, took it for dead and removed
    it."""
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    if lock(descriptor) is not False and same(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _locked(path: Path, open_new: Callable[[Path], int | None]) -> Iterator[tuple[Path, int]]:
    new, descriptor = hidden_name(path), None
    try:
        for _ in range(_TRIES):
            if (descriptor := open_new(new)) is not None:
                break
            new = hidden_name(path)
        else:
            raise SwquantError(f"{path}: other runs keep removing what is written for it; write elsewhere")
        yield new, descriptor
    finally:
        with uninterrupted():
            if new.is_dir():
                shutil.rmtree(new, ignore_errors=True)
            else:
                new.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)


@contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """A new hidden folder beside `out`, locked while the block runs, then removed if it still has its name."""

    def open_new(folder: Path) -> int | None:
        folder.mkdir()
        return _opened(folder, os.O_RDONLY)

    with _locked(out, open_new) as (folder, _):
        yield folder


@contextmanager
def locked_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new hidden file beside `path`, open for writing; otherwise as `locked_folder`."""
    with _locked(path, lambda new: _opened(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)) as opened:
        yield opened


def remove_dead(parent: Path) -> None:
    """Remove what runs that were killed left in a folder. What cannot be looked at or removed stays."""
    with suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if match := _PATTERN.fullmatch(name):
                _remove_if_dead(parent / name, match)


def _remove_if_dead(path: Path, match: re.Match[str]) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            owned = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            if not owned or not lock(descriptor) or not same(path, descriptor):
                return
            if stat.S_ISREG(status.st_mode):
                path.unlink()
            elif stat.S_ISDIR(status.st_mode):
                _bury(path, match)
        finally:
            os.close(descriptor)


def _bury(folder: Path, match: re.Match[str]) -> None:
    """Remove a dead folder, unless it is all that is left of an OUT, or holds what swquant did not put there."""
    out = folder.with_name(match["name"])
    if match["kind"] == "replaced" and not os.path.lexists(out):
        if len(os.fsencode(out.name)) < _LONGEST:  # otherwise the name is cut
            folder.rename(out)
        return
    if foreign(folder) is not None or (match["kind"] == "unfinished" and worth_keeping(folder)):
        return
    shutil.rmtree(folder, ignore_errors=True)
