"""Where a result goes: OUT is checked before anything is computed, built under a hidden name beside it, renamed whole.

Whatever happens before that rename, OUT does not exist or is still the old checkpoint. Nothing else is ever replaced:
neither what is not a checkpoint of ours, nor one that holds anything else, nor what appeared meanwhile, nor the source.
That is looked at before the work, again before the exchange, and once more in the old folder before it is deleted.

`hidden` knows the names and the locks, `exchange` the last act, `contents` what is whose.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from exporters.errors import SwquantError
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.companions import check_readable
from swquant.interrupts import sigterm_interrupts, uninterrupted
from swquant.output.contents import may_be_ours, why_not_ours
from swquant.output.exchange import flush, flush_folder, swap, swap_back
from swquant.output.hidden import forget, locked_file, locked_folder, remove_dead, visible
from swquant.scratch import lock, same

__all__ = ["check_destination", "check_space", "replace", "unfinished", "write_whole", "writing"]

_PATIENCE = 30.0  # seconds that another run may take to delete what it replaced
_APPEARED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_destination(out: Path, overwrite: bool, source: ModelFolder) -> None:
    """Raise SwquantError unless OUT can be created, and all that goes into it can be read. Called before the probe:
    nobody waits to be refused. overwrite: whether OUT may be replaced."""
    try:
        out.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except OSError as error:  # too long a name, a file for a folder, a folder that may not be entered
        raise SwquantError(f"{out}: cannot be created ({error.strerror}); give another OUT") from None
    if out.is_symlink():
        raise SwquantError(f"{out}: a symbolic link to {os.readlink(out)}; give a folder as OUT")
    target = out.resolve()
    if any(path.resolve().is_relative_to(target) for path in source.files):
        raise SwquantError(f"{out}: holds the source {source.name}, which is never replaced; give another OUT")
    if exists and _is_mount_point(target):
        raise SwquantError(
            f"{out}: a mount point, whose name cannot be given to another folder; give {out}/NAME as OUT"
        )
    if exists and not overwrite:
        instead = ", or --overwrite to replace it" if may_be_ours(out) else ""
        raise SwquantError(f"{out}: exists already; give another OUT{instead}")
    if exists and (problem := why_not_ours(out)):
        raise SwquantError(f"{out}: {problem}")
    if source.fills_folder and target.is_relative_to(source.folder.resolve()):
        raise SwquantError(f"{out}: lies inside the source {source.name}; give an OUT beside it")
    if not target.parent.is_dir():
        raise SwquantError(f"{out}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise SwquantError(f"{out}: the folder {target.parent} cannot be written to; give another OUT")
    if source.fills_folder:
        check_readable(source.folder, source.name, code=source.trust_remote_code)


def _is_mount_point(folder: Path) -> bool:
    """Whether something is mounted there. A folder of the same disk that is mounted again (a volume of a container) is
    told by Linux's table alone."""
    if folder.is_mount():
        return True
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            name = re.sub(rb"\\(\d{3})", lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4])
            if name == os.fsencode(folder):
                return True
    return False


def _no_space(out: Path, needed: int | None, remedy: str = "choose another OUT") -> SwquantError:
    """The error that says so, with the numbers."""
    sizes = "" if needed is None else f"{needed / 1e9:.2f} GB are needed, "
    sizes += f"{shutil.disk_usage(out.resolve().parent).free / 1e9:.2f} GB are free"
    return SwquantError(f"{visible(out)}: no space left; {sizes}; {remedy}")


def check_space(out: Path, needed: int) -> None:
    """Raise SwquantError where fewer than `needed` bytes are free."""
    if shutil.disk_usage(out.resolve().parent).free < needed:
        raise _no_space(out, needed)


@contextmanager
def writing(out: Path, needed: int | None = None, *, option: str = "OUT") -> Iterator[None]:
    """Whatever the system has against writing `out` becomes one SwquantError. needed: bytes, where they are known.
    option: how the user named `out`."""
    try:
        yield
    except OSError as error:
        notes = getattr(error, "__notes__", ())
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = _no_space(out, needed, "make room" if notes else "choose another OUT")
        else:
            named = visible(Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else out)
            problem = SwquantError(f"{named}: cannot be written ({error.strerror or error}); give another {option}")
        for note in notes:  # what is not lost
            problem.add_note(note)
        raise problem from None


@cache
def _cleaned(parent: Path) -> None:
    """Remove what dead runs left, once for every folder: a cache of measurements writes a thousand files into one."""
    remove_dead(parent)


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears with all of its content or not at all, also after a power cut."""
    _cleaned(path.parent.resolve())
    with locked_file(path) as (partial, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        partial.replace(path)
    flush_folder(path.parent)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that does not outlive the block, also not after Ctrl-C, SIGTERM or SIGHUP. What runs
    that could not clean up left there is removed first."""
    out = out.resolve()
    remove_dead(out.parent)
    with sigterm_interrupts(), locked_folder(out) as folder:
        yield folder


def replace(folder: Path, out: Path, overwrite: bool) -> None:
    """Give the finished folder its name, when it is on the disk. overwrite: take the place of an old checkpoint there,
    which is deleted. Raises SwquantError where something else is there, and leaves it as it is."""
    flush(folder)
    target = out.resolve()
    if out.is_symlink():
        raise SwquantError(f"{out}: a symbolic link that appeared meanwhile; give another OUT")
    with uninterrupted():
        while not (overwrite and os.path.lexists(target) and _takes_place(folder, target, out)):
            try:
                # The system renames no folder onto one that has something in it: nothing can slip by this check.
                folder.rename(target)
            except OSError as error:
                if error.errno not in _APPEARED:
                    raise
                if not overwrite:
                    raise SwquantError(f"{out}: exists already, it appeared meanwhile; give another OUT") from None
            else:
                break
        flush_folder(target.parent)


def _takes_place(folder: Path, target: Path, out: Path) -> bool:
    """Exchange `folder` with the checkpoint that is `target`, and delete that. False where it went away meanwhile.
    out: how the user named `target`."""
    with _held(target, out) as there:
        if not there:
            return False
        if problem := why_not_ours(target):
            raise SwquantError(f"{out}: {problem}")
        old = swap(folder, target)
        if problem := why_not_ours(old):  # nobody finds it under its name any more: this is the last word
            swap_back(folder, target, old)
            raise SwquantError(f"{out}: {problem}")
        forget(folder.parent)  # what lies there now is the old one
        shutil.rmtree(old, ignore_errors=True)
        return True


@contextmanager
def _held(target: Path, out: Path) -> Iterator[bool]:
    """The folder that is `target`, locked: no other run replaces it or takes it for dead meanwhile. Gives False where
    there is none any more."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(target, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            yield False
            return
        try:
            if lock(descriptor) is not False and same(target, descriptor):
                yield True
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > until:
            raise SwquantError(f"{out}: another run is replacing it; wait for that to end, or give another OUT")
        time.sleep(0.05)
