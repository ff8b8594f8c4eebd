"""What a run leaves that was interrupted, so that the same command can go on.

    .NAME.unfinished-1a2b3c4d/       beside OUT: one for each OUT, whose eight digits are a hash of NAME
        journal.jsonl                what is written, and of which work it is (`journal`)
        NAME-w4-b128/                what OUT will be

A run holds a lock on the outer folder, as on every hidden name (`hidden`). The folder goes when OUT has its name; when
the run fails before the journal has a step, or because of what it was given; or with --fresh. Otherwise it stays, and
runs for other OUTs let it be. Where a file system has no locks, nobody can tell an interrupted run from a living one,
and nothing stays.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import SwquantError
from exporters.text import shown
from swquant.interrupts import sigterm_interrupts, uninterrupted
from swquant.output.hidden import JOURNAL, foreign, left_name, locked_folder, remove_dead, worth_keeping
from swquant.output.journal import read_journal
from swquant.scratch import lock, same

__all__ = ["Leftover", "leftover", "resumable"]

_PATIENCE = 1.0  # seconds: a run that looks for dead ones beside it holds each for an instant


@dataclass(frozen=True)
class Leftover:
    """What lies beside OUT of another run. head: of its journal, with the number of all `tensors`. done: how many it
    wrote. running: whether it goes on writing."""

    head: Mapping[str, Any]
    done: int
    running: bool

    def __str__(self) -> str:
        return f"{self.done} of {self.head.get('tensors')} tensors"


def leftover(out: Path) -> Leftover | None:
    """What another run left beside `out`, or is writing there; None if there is nothing to go on from."""
    folder = left_name(out.resolve())
    entries = read_journal(folder / JOURNAL)
    running = False
    with suppress(OSError):
        descriptor = os.open(folder, _FLAGS)
        try:
            running = _locked(descriptor) is False
        finally:
            os.close(descriptor)
    if not running and not worth_keeping(folder):
        return None
    return Leftover(entries[0] if entries else {}, max(0, len(entries) - 1), running)


_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def _locked(descriptor: int) -> bool | None:
    """As `lock`, but it waits a moment for somebody else."""
    until = time.monotonic() + _PATIENCE
    while (mine := lock(descriptor)) is False and time.monotonic() < until:
        time.sleep(0.02)
    return mine


@contextmanager
def resumable(out: Path, *, fresh: bool = False) -> Iterator[Path]:
    """The hidden folder of `out`, with what an interrupted run left in it unless `fresh`. Removed when the block ends;
    kept if it ends in an error and the journal in it has a step: then a note of the error says so. Raises
    SwquantError where another run has it."""
    out = out.resolve()
    remove_dead(out.parent)
    with sigterm_interrupts():
        claimed = _claimed(out)
        if claimed is None:  # no locks here
            with locked_folder(out) as folder:
                yield folder
            return
        folder, descriptor = claimed
        keep = False
        try:
            if fresh:
                _empty(folder)
            yield folder
        except BaseException as error:
            if keep := worth_keeping(folder):
                error.add_note(_how_to_go_on(folder))
            raise
        finally:
            with uninterrupted():
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)


def _how_to_go_on(folder: Path) -> str:
    head, *done = read_journal(folder / JOURNAL)
    return (
        f"{len(done)} of {head.get('tensors')} tensors are kept: the same command goes on, with --fresh it starts over"
    )


def _claimed(out: Path) -> tuple[Path, int] | None:
    """The folder, made or found, and its descriptor, locked. None where there are no locks."""
    folder = left_name(out)
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            descriptor = os.open(folder, _FLAGS | getattr(os, "O_DIRECTORY", 0))
        except FileNotFoundError:  # another run removed it meanwhile
            continue
        try:
            mine = _locked(descriptor)
            if mine is False:
                raise SwquantError(f"{out}: another run is writing it; wait for that to end, or give another OUT")
            if mine is None:
                with suppress(OSError):
                    folder.rmdir()
            elif not same(folder, descriptor):
                mine = False
            elif (stranger := foreign(folder)) is not None:
                raise SwquantError(
                    f"{folder / stranger}: swquant did not put {shown(stranger)} there; move it elsewhere"
                )
        except BaseException:
            os.close(descriptor)
            raise
        if mine:
            return folder, descriptor
        os.close(descriptor)
        if mine is None:
            return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
