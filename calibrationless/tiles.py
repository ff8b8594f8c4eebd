"""Tiles: blocks side by side, one in every lane of the processor's vectors. What the compiled searches stand on.

A search tries dozens of scales on every block. In torch each trial is half a dozen passes over memory; here a tile of
`LANES` blocks, [elements, LANES], stays in the cache while all trials run over it. Each block's sums are made in the
order of its weights, whatever the vectors' width: the same codes on every machine, on any number of threads.

The functions release the interpreter's lock, so `for_pieces` runs them on several threads. They are compiled at their
first call (a few seconds) and kept in numba's cache on the disk.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["LANES", "RUN", "Floats", "compiled", "extend_range", "load_tile"]

Floats = NDArray[np.float32]
LANES = 32
RUN = 64  # weights whose sums are made by themselves: one long sum in float32 is too rough for whole rows in 8 bits
# No sum may change its order, and no product may melt into one: what is computed is what is written.
compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def load_tile(weights: Floats, importance: Floats, first: int, begin: int, w: Floats, h: Floats) -> None:
    """Blocks `begin` and following, and their importance, to the lanes of a tile; the last one also to those left."""
    for lane in range(LANES):
        block = min(begin + lane, weights.shape[0] - 1)
        row = (first + block) % importance.shape[0]
        for i in range(weights.shape[1]):
            w[i, lane] = weights[block, i]
            h[i, lane] = importance[row, i]


@compiled
def extend_range(w: Floats, low: Floats, high: Floats) -> None:
    """Extend low and high of every lane to its weights."""
    for i in range(w.shape[0]):
        for lane in range(LANES):
            value = w[i, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]
