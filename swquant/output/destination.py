"""Where a result goes: OUT is checked before anything is computed, built under a hidden name beside it, renamed whole.

Whatever happens before that rename, OUT does not exist or is still the old checkpoint. Nothing else is ever
replaced: neither what is not a checkpoint of ours, nor what appeared meanwhile, nor the source.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporters.errors import SwquantError
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.manifest import MANIFEST
from swquant.interrupts import sigterm_interrupts, uninterrupted

__all__ = ["check_destination", "check_space", "replace", "unfinished", "write_whole", "writing"]


def check_destination(out: Path, overwrite: bool, source: ModelFolder) -> None:
    """Raise SwquantError unless OUT can be created. Called before the probe: nobody waits to be refused."""
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
    if exists and not overwrite:
        raise SwquantError(f"{out}: exists already; give another OUT, or --overwrite to replace it")
    if exists and not _ours(out):
        raise SwquantError(f"{out}: exists and is not a checkpoint; --overwrite replaces only checkpoints of swquant")
    if source.fills_folder and target.is_relative_to(source.folder.resolve()):
        raise SwquantError(f"{out}: lies inside the source {source.name}; give an OUT beside it")
    if not target.parent.is_dir():
        raise SwquantError(f"{out}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise SwquantError(f"{out}: the folder {target.parent} cannot be written to; give another OUT")


def _ours(out: Path) -> bool:
    """Whether `out` is a folder that --overwrite may replace: a compressed checkpoint, or empty."""
    try:
        return out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    except OSError:  # it cannot be looked into
        return False


def _no_space(out: Path, needed: int | None) -> SwquantError:
    """The error that says so, with the numbers."""
    folder = out.resolve().parent
    sizes = "" if needed is None else f"{needed / 1e9:.2f} GB are needed, "
    sizes += f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free"
    return SwquantError(f"{folder}: no space left; {sizes}; choose another OUT")


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(out, needed) from None
        problem = f"{error.filename or out}: cannot be written ({error.strerror or error})"
        raise SwquantError(f"{problem}; give another {option}") from None


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears with all of its content or not at all."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that does not outlive the block, also not after Ctrl-C or SIGTERM."""
    out = out.resolve()
    folder = out.parent / f".{out.name[:40]}.partial-{secrets.token_hex(4)}"  # 255 bytes are the limit of most disks
    with sigterm_interrupts():
        try:
            folder.mkdir()
            yield folder
        finally:
            with uninterrupted():
                shutil.rmtree(folder, ignore_errors=True)


def replace(folder: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder to its name. An old checkpoint there moves aside first, comes back if that fails, and
    is deleted last."""
    target = out.resolve()
    aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
    with uninterrupted():
        if overwrite and target.exists():
            target.rename(aside)
        try:
            folder.rename(target)
        except BaseException as error:
            if aside.exists():
                aside.rename(target)
            # The system renames no folder onto one that has something in it: nothing can slip by this check.
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise SwquantError(f"{out}: exists already, it appeared meanwhile; give another OUT") from None
            raise
        shutil.rmtree(aside, ignore_errors=True)
