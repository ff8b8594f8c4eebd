"""Rounding and measuring in one pass over memory each, compiled by numba: what torch does in half a dozen.

Where `kernels` searches, time goes into trials on a tile that stays in the cache. Here every weight is looked at once,
and what counts is how often it comes from memory.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["block_extremes", "cut_blocks", "error_sums"]

Floats = NDArray[np.float32]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def block_extremes(weights: Floats, low: Floats, high: Floats) -> None:
    """The smallest and the largest weight of each block, both NaN where one is.

    weights: float32 [blocks, elements]. low, high: float32 [blocks], out. What is compared are whole numbers that have
    the order of the floats: a loop over floats, one of which may be NaN, is not vectorized.
    """
    bits, found = weights.view(np.int32), np.empty(2, np.int32)
    for block in range(weights.shape[0]):
        row, smallest, largest = bits[block], np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(row.shape[0]):
            key = np.int32(row[i] ^ ((row[i] >> 31) & 0x7FFFFFFF))
            smallest = key if key < smallest else smallest
            largest = key if key > largest else largest
        found[0] = smallest ^ ((smallest >> 31) & 0x7FFFFFFF)
        found[1] = largest ^ ((largest >> 31) & 0x7FFFFFFF)
        low[block], high[block] = found.view(np.float32)
        if np.isnan(low[block]) or np.isnan(high[block]):
            low[block], high[block] = np.float32(np.nan), np.float32(np.nan)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def cut_blocks(
    weights: Floats, scale: Floats, offset: Floats, zero_point: Floats, levels: int, codes: NDArray[np.uint8]
) -> None:
    """codes = clamp(round((weights - offset) / scale) + zero_point), ties to the even one, in one pass over memory.

    weights: float32 [blocks, elements]. scale, never 0, offset and zero_point: float32 [blocks]. codes: uint8 [blocks,
    elements], out. Exactly what torch gives step by step, in six passes.
    """
    top = np.float32(levels - 1)
    for block in range(weights.shape[0]):
        w, out, step, low, zero = weights[block], codes[block], scale[block], offset[block], zero_point[block]
        for i in range(w.shape[0]):
            code = np.rint((w[i] - low) / step) + zero
            out[i] = np.int32(min(max(code, np.float32(0.0)), top))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def error_sums(decoded: Floats, weights: Floats, importance: Floats, first: int, sums: NDArray[np.float64]) -> None:
    """What rounding cost, in one pass. sums: float64 [5], out: of the squared errors, of the squared weights, the
    largest error, and both sums with every square times its importance.

    decoded, weights: float32 [blocks, elements]; importance: float32 [period, elements], block b has row (first + b) %
    period. Squares are float32 and added up in float64 in eight lanes: the sums are the same on every processor.
    """
    period, whole = importance.shape[0], weights.shape[1] - weights.shape[1] % 8
    lanes, largest = np.zeros((4, 8)), np.zeros(8, np.float32)
    errors, totals, weighted, weighted_totals = lanes[0], lanes[1], lanes[2], lanes[3]
    for block in range(weights.shape[0]):
        d, w, h = decoded[block], weights[block], importance[(first + block) % period]
        for start in range(0, whole, 8):
            for lane in range(8):
                i = start + lane
                difference = abs(d[i] - w[i])
                error, own = difference * difference, w[i] * w[i]
                largest[lane] = max(largest[lane], difference)
                errors[lane] += error
                totals[lane] += own
                weighted[lane] += error * h[i]
                weighted_totals[lane] += own * h[i]
        for i in range(whole, weights.shape[1]):
            difference = abs(d[i] - w[i])
            error, own = difference * difference, w[i] * w[i]
            largest[0] = max(largest[0], difference)
            errors[0] += error
            totals[0] += own
            weighted[0] += error * h[i]
            weighted_totals[0] += own * h[i]
    sums[0], sums[1], sums[2] = errors.sum(), totals.sum(), largest.max()
    sums[3], sums[4] = weighted.sum(), weighted_totals.sum()
