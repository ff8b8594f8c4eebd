"""What long work tells of itself while it runs: the small interface that pipelines talk to.

`silent` does nothing; `terminal.console.Terminal` draws bars. A pipeline is handed one and never knows which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Bar", "Progress", "silent"]


class Bar(Protocol):
    """Told of every step of a measured piece of work."""

    def advance(self, label: str, amount: int) -> None:
        """`amount` more is being worked on, that of `label`."""


class Progress:
    """Reports nothing; the base of what reports something."""

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something without a measure is going on."""
        yield

    def note(self, text: str) -> None:
        """Something worth knowing."""

    @contextmanager
    def bytes(self, text: str, total: int) -> Iterator[Bar]:
        """`total` bytes will be worked through."""
        yield _NoBar()

    @contextmanager
    def tokens(self, text: str, total: int) -> Iterator[Bar]:
        """`total` tokens will be worked through."""
        yield _NoBar()


class _NoBar:
    def advance(self, label: str, amount: int) -> None:
        pass


silent = Progress()
