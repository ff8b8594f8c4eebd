"""Loops that torch cannot fuse, compiled by numba: the inner loops of the searches.

A search tries dozens of scales on every block. In torch each trial is half a dozen passes over memory; here a tile of
blocks stays in the cache while all trials run over it. The tests compare it with a plain version that tries one block
after the other in float64.

`LANES` blocks are searched side by side, a block in every lane of the processor's vectors, so that a tile is
[elements, LANES]. Each block's sums are then made in the order of its weights, whatever the vectors' width: the same
codes on every machine, on any number of threads.

The functions release the interpreter's lock, so `for_pieces` runs them on several threads. They are compiled at their
first call (a few seconds) and kept in numba's cache on the disk.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["search_blocks", "search_lines", "settle_lines"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
LANES = 32
_RUN = 64  # weights whose sums are made by themselves: one long sum in float32 is too rough for whole rows in 8 bits
# No sum may change its order, and no product may melt into one: what is computed is what is written.
_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _load(weights: Floats, importance: Floats, first: int, begin: int, w: Floats, h: Floats) -> None:
    """Blocks `begin` and following, and their importance, to the lanes of a tile; the last one also to those left."""
    for lane in range(LANES):
        block = min(begin + lane, weights.shape[0] - 1)
        row = (first + block) % importance.shape[0]
        for i in range(weights.shape[1]):
            w[i, lane] = weights[block, i]
            h[i, lane] = importance[row, i]


@_compiled
def _range(w: Floats, low: Floats, high: Floats) -> None:
    """Extend low and high of every lane to its weights."""
    for i in range(w.shape[0]):
        for lane in range(LANES):
            value = w[i, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]


@_compiled
def _fit(w: Floats, h: Floats, inverse: Floats, low: Floats, high: Floats, product: Floats, square: Floats) -> None:
    """sum h w q and sum h q q of q = clamp(rint(w * inverse), low, high): all that least squares needs."""
    product[:] = 0
    square[:] = 0
    for i in range(w.shape[0]):
        for lane in range(LANES):
            weight = w[i, lane]
            code = np.rint(weight * inverse[lane])
            code = code if code > low[lane] else low[lane]
            code = code if code < high[lane] else high[lane]
            weighted = h[i, lane] * code
            product[lane] += weighted * weight
            square[lane] += weighted * code


@_compiled
def _fit_all(w: Floats, h: Floats, inverse: Floats, low: Floats, high: Floats, sums: Floats) -> None:
    """The same run by run, to sums[0] and [1]; sums[2] and [3] are scratch."""
    _fit(w[:_RUN], h[:_RUN], inverse, low, high, sums[0], sums[1])
    for begin in range(_RUN, w.shape[0], _RUN):
        _fit(w[begin : begin + _RUN], h[begin : begin + _RUN], inverse, low, high, sums[2], sums[3])
        sums[:2] += sums[2:]


@_compiled
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
    half, top, zero = np.float32(levels // 2), np.float32(levels - 1), np.float32(0.0)
    w, h = np.empty((weights.shape[1], LANES), np.float32), np.empty((weights.shape[1], LANES), np.float32)
    lanes, sums = np.empty((8, LANES), np.float32), np.empty((4, LANES), np.float32)
    smallest, largest, inverse, low, high = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    best_gain, best_scale, best_zero, product, square = lanes[5], lanes[6], lanes[7], sums[0], sums[1]
    alive = np.empty(LANES, np.bool_)
    for begin in range(0, weights.shape[0], LANES):
        _load(weights, importance, first, begin, w, h)
        smallest[:], largest[:] = zero, zero
        _range(w, smallest, largest)
        best_gain[:], best_scale[:], best_zero[:] = np.float32(-1.0), zero, half
        # Of a symmetric scale, either sign: the code without a mirror image may go to the lesser extreme, too.
        for stretch in stretches:
            for trial in range(2 if symmetric else 2 * shifts + 1):
                for lane in range(LANES):
                    if symmetric:
                        spanning = half * stretch / max(largest[lane], -smallest[lane])
                        inverse[lane], point = spanning if trial else -spanning, half
                    else:
                        inverse[lane] = top * stretch / (largest[lane] - smallest[lane])
                        middle = (top - (largest[lane] + smallest[lane]) * inverse[lane]) * np.float32(0.5)
                        point = min(max(np.rint(middle) + np.float32(trial - shifts), zero), top)
                    low[lane], high[lane] = -point, top - point
                _fit_all(w, h, inverse, low, high, sums)
                for lane in range(LANES):
                    gain = product[lane] * (product[lane] / square[lane])
                    if square[lane] > 0 and gain > best_gain[lane]:
                        best_gain[lane], best_zero[lane] = gain, -low[lane]
                        best_scale[lane] = product[lane] / square[lane]
        alive[:] = best_scale != zero
        for _ in range(refits):
            for lane in range(LANES):
                inverse[lane] = np.float32(1.0) / best_scale[lane]
                low[lane], high[lane] = -best_zero[lane], top - best_zero[lane]
            _fit_all(w, h, inverse, low, high, sums)
            for lane in range(LANES):
                gain = product[lane] * (product[lane] / square[lane])
                alive[lane] = alive[lane] and square[lane] > 0 and gain > best_gain[lane]
                if alive[lane]:
                    best_gain[lane], best_scale[lane] = gain, product[lane] / square[lane]
            if not alive.any():
                break
        for lane in range(min(LANES, weights.shape[0] - begin)):
            zeros = smallest[lane] == largest[lane]  # a block of them has no range to try anything in
            scale[begin + lane] = np.float32(0.0) if zeros else best_scale[lane]
            zero_point[begin + lane] = half if zeros else best_zero[lane]


@_compiled
def _sums(
    w: Floats,
    h: Floats,
    inverse: Floats,
    shift: Floats,
    top: np.float32,
    total: Floats,
    square: Floats,
    product: Floats,
) -> None:
    """sum h q, sum h q q and sum h w q of q = clamp(rint(w * inverse + shift), 0, top): what a line through them
    needs."""
    total[:] = 0
    square[:] = 0
    product[:] = 0
    zero = np.float32(0.0)
    for i in range(w.shape[0]):
        for lane in range(LANES):
            weight = w[i, lane]
            code = np.rint(weight * inverse[lane] + shift[lane])
            code = code if code > zero else zero
            code = code if code < top else top
            weighted = h[i, lane] * code
            total[lane] += weighted
            square[lane] += weighted * code
            product[lane] += weighted * weight


@_compiled
def _sums_all(w: Floats, h: Floats, inverse: Floats, shift: Floats, top: np.float32, sums: Floats) -> None:
    """The same run by run, to the first three of `sums`; the others are scratch."""
    _sums(w[:_RUN], h[:_RUN], inverse, shift, top, sums[0], sums[1], sums[2])
    for begin in range(_RUN, w.shape[0], _RUN):
        _sums(w[begin : begin + _RUN], h[begin : begin + _RUN], inverse, shift, top, sums[3], sums[4], sums[5])
        sums[:3] += sums[3:]


@_compiled
def _center(w: Floats, h: Floats, mean: Floats, mass: Floats) -> None:
    """Weighted mean and sum of importance of every lane; the mean is taken from its weights."""
    mean[:] = 0
    mass[:] = 0
    for i in range(w.shape[0]):
        for lane in range(LANES):
            mass[lane] += h[i, lane]
            mean[lane] += h[i, lane] * w[i, lane]
    for lane in range(LANES):
        mean[lane] /= mass[lane]
    for i in range(w.shape[0]):
        for lane in range(LANES):
            w[i, lane] -= mean[lane]


@_compiled
def search_lines(
    weights: Floats,
    importance: Floats,
    first: int,
    stretches: Floats,
    shifts: Floats,
    levels: int,
    refits: int,
    scale: Floats,
    offset: Floats,
) -> None:
    """The best `scale * code + offset` of each block, written to `scale` (positive, 0 where all weights are equal) and
    `offset`.

    weights: float32 [blocks, elements]; importance: float32 [period, elements], block b has row (first + b) % period.
    stretches: candidates for the inverse scale, as factors of that which spans the range. shifts: of all codes, as
    fractions of a step. levels: 2^bits. scale, offset: float32 [blocks].
    """
    top = np.float32(levels - 1)
    w, h = np.empty((weights.shape[1], LANES), np.float32), np.empty((weights.shape[1], LANES), np.float32)
    lanes, sums = np.empty((11, LANES), np.float32), np.empty((6, LANES), np.float32)
    mean, mass, low, high, trial, moved = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    best, inverse, shift, found, line = lanes[6], lanes[7], lanes[8], lanes[9], lanes[10]
    total, square, product = sums[0], sums[1], sums[2]
    alive = np.empty(LANES, np.bool_)
    for begin in range(0, weights.shape[0], LANES):
        _load(weights, importance, first, begin, w, h)
        _center(w, h, mean, mass)
        low[:], high[:] = w[0], w[0]
        _range(w, low, high)
        best[:], inverse[:], shift[:] = np.float32(-1.0), np.float32(0.0), np.float32(0.0)
        for stretch in stretches:
            for move in shifts:
                for lane in range(LANES):
                    trial[lane] = top * stretch / (high[lane] - low[lane])
                    middle = (low[lane] + high[lane]) * np.float32(0.5)
                    moved[lane] = top * np.float32(0.5) + move - middle * trial[lane]
                _sums_all(w, h, trial, moved, top, sums)
                for lane in range(LANES):
                    spread = square[lane] - total[lane] * (total[lane] / mass[lane])
                    gain = product[lane] * (product[lane] / spread)
                    if spread > 0 and gain > best[lane]:
                        best[lane], inverse[lane], shift[lane] = gain, trial[lane], moved[lane]
        # The line through the best codes is not the one that they were cut with; its own codes may be better still.
        found[:], line[:], best[:] = np.float32(0.0), mean, np.float32(-1.0)
        alive[:] = low != high
        for _ in range(refits + 1):
            _sums_all(w, h, inverse, shift, top, sums)
            for lane in range(LANES):
                spread = square[lane] - total[lane] * (total[lane] / mass[lane])
                gain = product[lane] * (product[lane] / spread)
                alive[lane] = alive[lane] and spread > 0 and product[lane] > 0 and gain > best[lane]
                if alive[lane]:
                    best[lane], found[lane] = gain, product[lane] / spread
                    line[lane] = mean[lane] - found[lane] * total[lane] / mass[lane]
                    inverse[lane] = np.float32(1.0) / found[lane]
                    shift[lane] = total[lane] / mass[lane]  # -offset / step of the centered weights
            if not alive.any():
                break
        count = min(LANES, weights.shape[0] - begin)
        scale[begin : begin + count] = found[:count]
        offset[begin : begin + count] = line[:count]


@_compiled
def _left(
    w: Floats, h: Floats, step: Floats, shift: Floats, top: np.float32, error: Floats, rest: Floats, mass: Floats
) -> None:
    """sum h r r, sum h r and sum h of what codes of a step and a shift leave of the weights."""
    error[:] = 0
    rest[:] = 0
    mass[:] = 0
    zero = np.float32(0.0)
    for i in range(w.shape[0]):
        for lane in range(LANES):
            weight = w[i, lane]
            code = np.rint(weight / step[lane] + shift[lane])
            code = code if code > zero else zero
            code = code if code < top else top
            left = weight - step[lane] * (code - shift[lane])
            error[lane] += h[i, lane] * left * left
            rest[lane] += h[i, lane] * left
            mass[lane] += h[i, lane]


@_compiled
def settle_lines(
    weights: Floats,
    importance: Floats,
    first: int,
    levels: int,
    around: int,
    octave: int,
    steps: Floats,
    row_scale: Floats,
    blocks_per_row: int,
    scale: Floats,
    offset: Floats,
    exponents: Bytes,
    zeros: Bytes,
) -> None:
    """Bring scale and offset of each block to values that two bytes can hold, by least weighted error of the result.

    scale = row_scale * steps[exponent], offset = -scale * zero * levels / 256. row_scale: float32 [rows]; block b lies
    in row (first + b) // blocks_per_row. octave: exponents from one power of two to the next. around: exponents tried
    on each side of the nearest. scale, offset: float32 [blocks], in and out. exponents, zeros: uint8 [blocks], out.
    """
    top, unit = np.float32(levels - 1), np.float32(levels) / np.float32(256.0)
    w, h = np.empty((weights.shape[1], LANES), np.float32), np.empty((weights.shape[1], LANES), np.float32)
    lanes = np.empty((10, LANES), np.float32)
    step, start, zero, shift, error, rest, mass = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    best, found_scale, found_zero = lanes[7], lanes[8], lanes[9]
    nearest, found = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for begin in range(0, weights.shape[0], LANES):
        _load(weights, importance, first, begin, w, h)
        count = min(LANES, weights.shape[0] - begin)
        for lane in range(LANES):
            block = min(begin + lane, weights.shape[0] - 1)
            row = row_scale[(first + block) // blocks_per_row]
            nearest[lane] = 0
            if row > 0 and scale[block] > 0:
                steps_up = np.rint(octave * np.log2(scale[block] / row))
                nearest[lane] = int(min(max(np.float32(255.0) + steps_up, 0), 255))
            found[lane] = nearest[lane]
        best[:], found_scale[:], found_zero[:] = np.float32(np.inf), np.float32(0.0), np.float32(0.0)
        for away in range(-around, around + 1):
            for lane in range(LANES):
                block = min(begin + lane, weights.shape[0] - 1)
                exponent = nearest[lane] + away
                row = row_scale[(first + block) // blocks_per_row]
                step[lane] = row * steps[exponent] if 0 <= exponent <= 255 else np.float32(0.0)
                start[lane] = offset[block]
            for _ in range(2):
                for lane in range(LANES):
                    zero[lane] = min(
                        max(np.rint(-start[lane] / (step[lane] * unit)), np.float32(0.0)), np.float32(255.0)
                    )
                    shift[lane] = unit * zero[lane]
                _left(w, h, step, shift, top, error, rest, mass)
                for lane in range(LANES):
                    if step[lane] > 0 and error[lane] < best[lane]:
                        best[lane], found_scale[lane], found_zero[lane] = error[lane], step[lane], zero[lane]
                        found[lane] = nearest[lane] + away
                    start[lane] = -step[lane] * shift[lane] + rest[lane] / mass[lane]  # the best for these codes
        for lane in range(count):
            scale[begin + lane] = found_scale[lane]
            offset[begin + lane] = -found_scale[lane] * (unit * found_zero[lane])
            exponents[begin + lane], zeros[begin + lane] = found[lane], int(found_zero[lane])
