"""Ctrl-C and SIGTERM: both end a run in the same way, and neither while something is being put in order.

Only the main thread may handle signals. In another one these blocks change nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["sigterm_interrupts", "uninterrupted"]


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block: a process that it killed would leave its temporary files."""
    with _handled(_interrupt, signal.SIGTERM):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block."""
    arrived: list[int] = []
    with _handled(lambda number, _: arrived.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    for number in arrived[:1]:
        signal.raise_signal(number)
