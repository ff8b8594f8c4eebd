"""The last act: what is finished gets its name. Flushed first, then renamed; an old OUT is exchanged at once.

One call exchanges two names (`renameat2` with RENAME_EXCHANGE, Linux), so at every moment OUT is the old folder or the
new one. Where there is no such call the old one moves aside first, and for an instant there is no OUT; whoever is
killed then has its old OUT put back by the next run (`hidden`).

Renaming before the bytes are on the disk would leave, after a power cut, a folder that looks whole and is not.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from swquant.output.hidden import hidden_name

__all__ = ["exchange", "flush", "flush_folder", "swap", "swap_back"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once. False where system or file system cannot. Raises OSError."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def swap(folder: Path, out: Path) -> Path:
    """Put `folder` in the place of `out`. Returns where the old one is now. Where that fails, `out` is what it was."""
    if exchange(folder, out):
        return folder
    aside = hidden_name(out, "replaced")
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    return aside


def swap_back(folder: Path, out: Path, old: Path) -> None:
    """Undo `swap`, which gave `old`."""
    if old == folder:
        exchange(folder, out)
    else:
        out.rename(folder)
        old.rename(out)


def flush_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def flush(folder: Path) -> None:
    """Every byte and every name below a folder is on the disk when this returns. Raises OSError."""
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        flush_folder(Path(root))
