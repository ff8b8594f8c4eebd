"""OUT as a file: checked before the work, written under a hidden name beside it, renamed whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporters.errors import SwquantError
from exporters.gguf.write import is_ours
from swquant.checkpoints.base import Checkpoint
from swquant.interrupts import sigterm_interrupts, uninterrupted
from swquant.output.destination import check_destination
from swquant.output.exchange import flush_folder
from swquant.output.hidden import locked_file, remove_dead

__all__ = ["check_file", "whole_file"]


def check_file(out: Path, overwrite: bool, source: Checkpoint) -> None:
    """Raise SwquantError unless the file can be created, or is one of ours that may be replaced."""
    if out.suffix != ".gguf":
        raise SwquantError(f"{out}: a GGUF file is named NAME.gguf, and readers insist on that; give such an OUT")
    if not os.path.lexists(out):
        check_destination(out, overwrite, source)
        return
    if out.is_symlink() or not out.is_file():
        raise SwquantError(f"{out}: is no file, and is not replaced; give another OUT")
    if any(path.resolve() == out.resolve() for path in source.files):
        raise SwquantError(f"{out}: is the source {source.name}, which is never replaced; give another OUT")
    if not overwrite:
        raise SwquantError(f"{out}: exists already; give another OUT, or --overwrite to replace it")
    if not is_ours(out):
        raise SwquantError(f"{out}: no GGUF file that swquant wrote, so it is not replaced; give another OUT")


@contextmanager
def whole_file(out: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden file beside `out` that gets its name when the block ends well. Raises SwquantError where something
    appeared there meanwhile."""
    target = out.resolve()
    remove_dead(target.parent)
    with sigterm_interrupts(), locked_file(target) as (partial, descriptor):
        yield partial
        os.fsync(descriptor)
        with uninterrupted():
            if os.path.lexists(target) and not (overwrite and target.is_file() and is_ours(target)):
                raise SwquantError(f"{out}: exists already, it appeared meanwhile; give another OUT")
            partial.replace(target)
            flush_folder(target.parent)
