"""Ctrl-C, SIGTERM and SIGHUP: all end a run in the same way, and none while something is being put in order.

SIGTERM is what schedulers and `kill` send, SIGHUP what a closed terminal or a lost connection does; left alone, both
kill at once and leave half-written files. A signal that is ignored stays ignored: `nohup` must keep its promise.

Only the main thread may handle signals. In another one these blocks change nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["sigterm_interrupts", "uninterrupted"]

# Windows has no SIGHUP.
_ENDS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in numbers}
    # None: set by something that is not Python, which could not be put back.
    previous = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside the block: a process that they killed would leave its temporary
    files."""
    with _handled(_interrupt, *_ENDS):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait until the end of the block."""
    arrived: list[int] = []
    with _handled(lambda number, _: arrived.append(number), signal.SIGINT, *_ENDS):
        yield
    for number in arrived[:1]:
        signal.raise_signal(number)
