"""The inner loop of `super_blocks`: small integers for the scales and offsets of 256 weights, compiled by numba.

A super-block stays in the first cache while all trials run over it, and the tests compare the result
with a plain version.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["settle_super_blocks"]

Floats = NDArray[np.float32]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _half(value):  # type: ignore[no-untyped-def]
    """The nearest float16, ties to even, as a float32; beyond the largest, that. numba knows no float16."""
    if value == 0:
        return np.float32(0.0)
    _, exponent = math.frexp(value)
    unit = math.ldexp(1.0, max(exponent - 11, -24))
    return np.float32(min(max(np.rint(value / unit) * unit, -65504.0), 65504.0))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "arcp"}, error_model="numpy")
def _trial(w: Floats, h: Floats, step: np.float32, offset: np.float32, low: np.float32, high: np.float32):  # type: ignore[no-untyped-def]
    """(weighted error, weighted sum of what is left) of w on the line `step * code + offset`."""
    error, rest = np.float32(0.0), np.float32(0.0)
    inverse = np.float32(0.0) if step == 0 else np.float32(1.0) / step
    for i in range(w.shape[0]):
        code = min(max(np.rint((w[i] - offset) * inverse), low), high)
        left = w[i] - offset - step * code
        error += h[i] * left * left
        rest += h[i] * left
    return error, rest


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _settle(w, h, size, low, high, limit, unit, unit_low, start_scale, start_offset, scales, mins):  # type: ignore[no-untyped-def]
    """The integers of each block of one super-block for given units, written to `scales` and `mins`. Returns the error.

    Tried are the nearest scale and its neighbours, each with the offset of the start and with the best for its codes.
    """
    total = np.float32(0.0)
    for block in range(start_scale.shape[0]):
        part, heavy = w[block * size : (block + 1) * size], h[block * size : (block + 1) * size]
        mass = np.float32(0.0)
        for i in range(size):
            mass += heavy[i]
        smallest = -limit if low < 0 else 0
        nearest = 0 if unit == 0 else int(min(max(np.rint(start_scale[block] / unit), smallest), limit))
        best, scales[block], mins[block] = np.float32(np.inf), nearest, 0
        for scale in range(max(nearest - 1, smallest), min(nearest + 1, limit) + 1):
            step, offset = unit * np.float32(scale), start_offset[block]
            for _ in range(2):
                least = 0 if unit_low == 0 else int(min(max(np.rint(-offset / unit_low), 0), limit))
                error, rest = _trial(part, heavy, step, -unit_low * np.float32(least), low, high)
                if error < best:
                    best, scales[block], mins[block] = error, scale, least
                if unit_low == 0:
                    break
                offset = -unit_low * np.float32(least) + rest / mass
        total += best
    return total


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _refit(w, h, size, low, high, unit, unit_low, scales, mins):  # type: ignore[no-untyped-def]
    """Both units by weighted least squares, for the codes and integers that were found with these."""
    aa, ab, bb, wa, wb = 0.0, 0.0, 0.0, 0.0, 0.0
    for block in range(scales.shape[0]):
        step, offset = unit * np.float32(scales[block]), -unit_low * np.float32(mins[block])
        b = -float(mins[block])
        for i in range(block * size, (block + 1) * size):
            code = np.float32(0.0)
            if step != 0:
                code = min(max(np.rint((w[i] - offset) / step), low), high)
            a = float(scales[block]) * code
            aa += h[i] * a * a
            ab += h[i] * a * b
            bb += h[i] * b * b
            wa += h[i] * w[i] * a
            wb += h[i] * w[i] * b
    determinant = aa * bb - ab * ab
    if bb > 0 and determinant > 1e-12 * aa * bb:
        return _half((wa * bb - wb * ab) / determinant), _half((wb * aa - wa * ab) / determinant)
    if aa > 0:
        return _half(wa / aa), unit_low
    return unit, _half(wb / bb) if bb > 0 else unit_low


@numba.njit(cache=True, nogil=True, error_model="numpy")
def settle_super_blocks(
    weights: Floats,
    importance: Floats,
    first: int,
    levels: int,
    signed: bool,
    limit: int,
    stretches: Floats,
    rounds: int,
    scale: Floats,
    offset: Floats,
    units: Floats,
    unit_lows: Floats,
    scales: NDArray[np.int16],
    mins: NDArray[np.uint8],
) -> None:
    """Bring scale and offset of each block to multiples of two float16 numbers of its super-block.

    scale = units[super] * scales[super, block], offset = -unit_lows[super] * mins[super, block]. signed: codes run from
    -levels/2 and there are no offsets; otherwise from 0. limit: the largest integer. stretches: first units tried, as
    factors of the smallest that reaches all scales; each is refitted `rounds` times to what was found with it.

    weights: float32 [supers, 256]; importance: float32 [period, 256], super-block s has row (first + s) % period.
    scale, offset: float32 [supers, blocks], where the search starts. units, unit_lows: float32 [supers], of float16
    values, out. scales: int16, mins: uint8 [supers, blocks], out.
    """
    period, size = importance.shape[0], weights.shape[1] // scale.shape[1]
    low = np.float32(-(levels // 2)) if signed else np.float32(0.0)
    high = low + np.float32(levels - 1)
    found_scales, found_mins = np.zeros_like(scales[:1])[0], np.zeros_like(mins[:1])[0]
    for index in range(weights.shape[0]):
        w, h = weights[index], importance[(first + index) % period]
        largest, lowest = np.float32(0.0), np.float32(0.0)
        for block in range(scale.shape[1]):
            largest = max(largest, abs(scale[index, block]))
            lowest = max(lowest, -offset[index, block])
        best = np.float32(np.inf)
        for stretch in stretches:
            unit, unit_low = _half(largest / limit * stretch), np.float32(0.0)
            if not signed:
                unit_low = _half(lowest / limit)
            for _ in range(rounds + 1):
                error = _settle(
                    w, h, size, low, high, limit, unit, unit_low, scale[index], offset[index], found_scales, found_mins
                )
                if error < best:
                    best, units[index], unit_lows[index] = error, unit, unit_low
                    scales[index], mins[index] = found_scales, found_mins
                unit, unit_low = _refit(w, h, size, low, high, unit, unit_low, found_scales, found_mins)
                if unit_low < 0 or unit < 0:
                    break
