"""What a run does with OUT, without the run: for the tests of destinations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from swquant.output.destination import replace, unfinished, writing

__all__ = ["TEXT", "finish", "make", "names"]

TEXT = "precious"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finish(out: Path, word: str, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """What a run with --overwrite does with OUT, without the run."""
    with writing(out), unfinished(out) as folder:
        make(folder, word)
        meanwhile()
        replace(folder, out, overwrite=True)


def make(folder: Path, word: str) -> None:
    """A folder that passes for a checkpoint when it is asked whose it is."""
    (folder / "swquant").mkdir(parents=True)
    (folder / "word").write_text(word)
