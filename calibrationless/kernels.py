"""Loops that torch cannot fuse, compiled by numba: the inner loop of the scale search.

A search tries dozens of scales on every block. In torch each trial is half a dozen passes over memory; here a block of
weights stays in the first cache while all trials run over it. The tests compare it with a plain version that
tries one block after the other in float64.

The functions release the interpreter's lock, so `for_pieces` runs them on several threads. They are compiled at their
first call (a few seconds) and kept in numba's cache on the disk.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["search_blocks"]

Floats = NDArray[np.float32]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "arcp"}, error_model="numpy")
def _fit(weights: Floats, importance: Floats, inverse: np.float32, low: np.float32, high: np.float32):  # type: ignore[no-untyped-def]
    """(sum h w q, sum h q q) of q = clamp(rint(w * inverse), low, high): all that least squares needs."""
    product, square = np.float32(0.0), np.float32(0.0)
    for i in range(weights.shape[0]):
        code = min(max(np.rint(weights[i] * inverse), low), high)
        weighted = importance[i] * code
        product += weighted * weights[i]
        square += weighted * code
    return product, square


@numba.njit(cache=True, nogil=True, error_model="numpy")
def search_blocks(
    weights: Floats,
    importance: Floats,
    first: int,
    stretches: Floats,
    levels: int,
    shifts: int,
    symmetric: bool,
    refits: int,
    scale: Floats,
    zero_point: Floats,
) -> None:
    """The best scale and zero point of each block, written to `scale` and `zero_point`.

    weights: float32 [blocks, elements]; importance: float32 [period, elements], block b has row (first + b) % period.
    stretches: candidates for the inverse scale, as factors of plain rounding's. levels: 2^bits.
    shifts: how many zero points to try on each side of the plain one. scale, zero_point: float32 [blocks].
    """
    period = importance.shape[0]
    half, top = np.float32(levels // 2), np.float32(levels - 1)
    for block in range(weights.shape[0]):
        w, h = weights[block], importance[(first + block) % period]
        smallest, largest = np.float32(0.0), np.float32(0.0)
        for i in range(w.shape[0]):
            smallest = min(smallest, w[i])
            largest = max(largest, w[i])
        best_gain, best_scale, best_zero = np.float32(-1.0), np.float32(0.0), half
        if smallest == largest:
            scale[block], zero_point[block] = best_scale, best_zero
            continue
        for stretch in stretches:
            if symmetric:
                # Either sign of the scale: the code without a mirror image may go to the lesser extreme, too.
                inverse = half * stretch / max(largest, -smallest)
                trials = 2
            else:
                inverse = top * stretch / (largest - smallest)
                trials = 2 * shifts + 1
            middle = (top - (largest + smallest) * inverse) * np.float32(0.5)
            for trial in range(trials):
                if symmetric:
                    zero = half
                    inverse = -inverse
                else:
                    zero = min(max(np.rint(middle) + np.float32(trial - shifts), np.float32(0.0)), top)
                product, square = _fit(w, h, inverse, -zero, top - zero)
                if square > 0:
                    gain = product * (product / square)
                    if gain > best_gain:
                        best_gain, best_scale, best_zero = gain, product / square, zero
        for _ in range(refits):
            if best_scale == 0:
                break
            product, square = _fit(w, h, np.float32(1.0) / best_scale, -best_zero, top - best_zero)
            if square > 0 and product * (product / square) > best_gain:
                best_gain, best_scale = product * (product / square), product / square
            else:
                break
        scale[block], zero_point[block] = best_scale, best_zero
