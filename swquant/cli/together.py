"""What is seen of processes that torchrun or accelerate started together: the first of them, and of their errors one.

Every process finds the same error in a bad input, and one that fails alone brings the others down. Whoever is the first
to fail says so (`Voice.speaks`), the others end in silence with the same exit code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Voice", "started_together", "voice"]

_SAID, _OVER = "swquant/said", "swquant/over"
_FAREWELL = timedelta(seconds=30)


@dataclass(frozen=True)
class Voice:
    """Of this process. store: where several leave each other notes; None where it was started alone."""

    store: Store | None = None
    first: bool = True

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Nothing is seen of what runs in the block, unless this is the first process."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            yield

    def speaks(self, *, interrupted: bool = False) -> bool:
        """Whether this process says why it ends: the first that asks, of an interruption the first process alone, which
        knows what is kept."""
        if self.store is None:
            return True
        if interrupted and not self.first:
            return False
        with suppress(RuntimeError):  # the store has gone, with the process that spoke
            return int(self.store.add(_SAID, 1)) == 1
        return False

    def end(self, code: object) -> None:
        """Leave the others. After a failure those that wait for this process are told; and a launcher kills all that
        run when the first one ends, so that one has time to write down what was trained."""
        if self.store is None:
            return
        from swquant.parallel import leave

        leave()
        if not code:
            return
        with suppress(RuntimeError, KeyboardInterrupt):
            if self.first:
                self.store.set(_OVER, "")
            else:
                self.store.wait([_OVER], _FAREWELL)


def started_together() -> bool:
    """Whether something like torchrun started this process with others. Does not wait for torch where nothing did."""
    if "WORLD_SIZE" not in os.environ:
        return False
    # Otherwise a process that waits for one that has just ended says so in thirty lines of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from swquant.parallel import launched

    return launched()


def voice() -> Voice:
    """Of this process. Raises SwquantError where the processes of a run do not find each other."""
    if not started_together():
        return Voice()
    from swquant.parallel import meeting

    store, ours = meeting()
    return Voice(store, ours.first)
