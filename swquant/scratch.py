"""Temporary folders, and the locks that tell those of the dead from those of the living.

    swquant-offload-1a2b3c4d      where the system keeps such things (TMPDIR)

A run that is killed cannot remove its folder. So whoever makes one holds a lock on it (`flock`), which the kernel lets
go of when the process ends, however it ends; the next run that needs one removes those of this user that nobody holds.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # no flock: nobody is ever found dead
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock", "same", "temporary_folder"]

_USES = ("gguf", "offload", "profile", "rehearsal")
_PATTERN = re.compile(rf"swquant-({'|'.join(_USES)})-[a-z0-9_]{{8}}")


def lock(descriptor: int) -> bool | None:
    """Lock an open file or folder. True: it is ours; False: somebody else's; None: this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def same(path: Path, descriptor: int) -> bool:
    """Whether a path still names what was opened."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def temporary_folder(use: str) -> Iterator[Path]:
    """A new empty folder, removed when the block ends, or by the next run if this one is killed. use: of `_USES`."""
    assert use in _USES
    _remove_dead(Path(tempfile.gettempdir()))
    path, descriptor = _made(use)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _made(use: str) -> tuple[Path, int]:
    """A new folder, locked: again where another run took it for dead before it was."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"swquant-{use}-"))
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if lock(descriptor) is not False and same(path, descriptor):
                return path, descriptor
            os.close(descriptor)


@cache
def _remove_dead(parent: Path) -> None:
    """Remove what killed runs left, once in a process. What cannot be looked at or removed stays."""
    with suppress(OSError):
        for name in sorted(os.listdir(parent)):
            if _PATTERN.fullmatch(name):
                _remove_if_dead(parent / name)


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(descriptor)
            owned = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            if owned and stat.S_ISDIR(status.st_mode) and lock(descriptor) and same(path, descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
