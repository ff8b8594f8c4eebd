"""How readers that are Python time what they write, in whatever environment they run. See `deployments.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

__all__ = ["report"]


def report(written: Callable[[int], list[int]], tokens: int) -> None:
    """Print greedy tokens and the seconds that all but the first take: the best of two, each way."""
    seconds = []
    for count in (1, tokens, 1, tokens):
        begun = time.perf_counter()
        greedy = written(count)
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"greedy": greedy, "seconds": min(seconds[1::2]) - min(seconds[::2])}))
