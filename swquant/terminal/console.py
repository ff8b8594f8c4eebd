"""What a person sees while swquant works: a rich bar on a terminal, plain lines elsewhere, nothing with --json.

`Progress` is the small interface that the pipeline talks to; `silent` does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from swquant.progress import Bar, Progress
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

__all__ = ["Terminal"]


def _human_tokens(count: float) -> str:
    return f"{count:,.0f} tokens"


class _RichBar:
    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, label: str, amount: int) -> None:
        self._progress.update(self._task, advance=amount, label=marked(label))


class _LineBar:
    """One line for every tenth of the work."""

    def __init__(self, console: Console, text: str, total: int, human: Callable[[float], str]) -> None:
        self._console, self._text, self._total, self._human = console, text, max(total, 1), human
        self._done, self._printed, self._start = 0, 0, time.monotonic()

    def advance(self, label: str, amount: int) -> None:
        self._done += amount
        tenth = 10 * self._done // self._total
        if tenth > self._printed:
            self._printed = tenth
            rate = self._done / max(time.monotonic() - self._start, 1e-9)
            left = (self._total - self._done) / rate
            self._console.print(
                f"{marked_sentence(self._text)} {tenth * 10} %, {self._human(self._done)} of {self._human(self._total)}, "
                f"{self._human(rate)}/s, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


class Terminal(Progress):
    """Reports on a console: live bars on a terminal, lines in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        if self.console.is_terminal:
            with self.console.status(marked_sentence(text)):
                yield
        else:
            self.console.print(sentence(text), highlight=False, markup=False, soft_wrap=True)
            yield

    def note(self, text: str) -> None:
        self.console.print(sentence(text), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bytes(self, text: str, total: int) -> Iterator[Bar]:
        with self._bar(text, total, human_bytes, (DownloadColumn(), TransferSpeedColumn())) as bar:
            yield bar

    @contextmanager
    def tokens(self, text: str, total: int) -> Iterator[Bar]:
        with self._bar(text, total, _human_tokens, (MofNCompleteColumn(), TextColumn("tokens"))) as bar:
            yield bar

    @contextmanager
    def _bar(
        self, text: str, total: int, human: Callable[[float], str], measure: tuple[ProgressColumn, ...]
    ) -> Iterator[Bar]:
        if not self.console.is_terminal:
            yield _LineBar(self.console, text, total, human)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), *measure, TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[label]}"),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as progress:
            yield _RichBar(progress, progress.add_task(marked_sentence(text), total=total, label=""))
