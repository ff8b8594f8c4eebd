"""The compiled search for scales and offsets, and for the bytes that stand for them: see `tiles` and `affine`.

The tests compare it with a plain version that tries one block after the other in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrationless.tiles import LANES, RUN, Floats, compiled, extend_range, load_tile

__all__ = ["search_lines", "settle_lines"]

Bytes = NDArray[np.uint8]


@compiled
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


@compiled
def _sums_all(w: Floats, h: Floats, inverse: Floats, shift: Floats, top: np.float32, sums: Floats) -> None:
    """The same run by run, to the first three of `sums`; the others are scratch."""
    _sums(w[:RUN], h[:RUN], inverse, shift, top, sums[0], sums[1], sums[2])
    for begin in range(RUN, w.shape[0], RUN):
        _sums(w[begin : begin + RUN], h[begin : begin + RUN], inverse, shift, top, sums[3], sums[4], sums[5])
        sums[:3] += sums[3:]


@compiled
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


@compiled
def _try_lines(
    w: Floats,
    h: Floats,
    stretches: Floats,
    shifts: Floats,
    top: np.float32,
    low: Floats,
    high: Floats,
    mass: Floats,
    cuts: Floats,
    sums: Floats,
) -> None:
    """The inverse step and the shift of every lane that cut the best codes, to the first two of `cuts`."""
    inverse, shift, trial, moved = cuts[0], cuts[1], cuts[2], cuts[3]
    total, square, product, best = sums[0], sums[1], sums[2], np.empty(LANES, np.float32)
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


@compiled
def _refit_lines(
    w: Floats,
    h: Floats,
    top: np.float32,
    refits: int,
    mean: Floats,
    mass: Floats,
    cuts: Floats,
    alive: NDArray[np.bool_],
    found: Floats,
    line: Floats,
    sums: Floats,
) -> None:
    """Scale and offset of every lane that is alive, to `found` and `line`.

    The line through the best codes is not the one that they were cut with; its own codes may be better still.
    """
    inverse, shift, best = cuts[0], cuts[1], np.empty(LANES, np.float32)
    total, square, product = sums[0], sums[1], sums[2]
    best[:] = np.float32(-1.0)
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


@compiled
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
    lanes, cuts, sums = (
        np.empty((6, LANES), np.float32),
        np.empty((4, LANES), np.float32),
        np.empty((6, LANES), np.float32),
    )
    mean, mass, low, high, found, line = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    alive = np.empty(LANES, np.bool_)
    for begin in range(0, weights.shape[0], LANES):
        load_tile(weights, importance, first, begin, w, h)
        _center(w, h, mean, mass)
        low[:], high[:] = w[0], w[0]
        extend_range(w, low, high)
        _try_lines(w, h, stretches, shifts, top, low, high, mass, cuts, sums)
        found[:], line[:] = np.float32(0.0), mean
        alive[:] = low != high
        _refit_lines(w, h, top, refits, mean, mass, cuts, alive, found, line, sums)
        count = min(LANES, weights.shape[0] - begin)
        scale[begin : begin + count] = found[:count]
        offset[begin : begin + count] = line[:count]


@compiled
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


@compiled
def _try_step(
    w: Floats, h: Floats, top: np.float32, unit: np.float32, step: Floats, start: Floats, best: Floats
) -> None:
    """One step of every lane, none where it is 0, with two bytes for the offset: the nearest to `start`, and to the
    best for its codes. best: error, step and byte of what was better than all before."""
    lanes = np.empty((5, LANES), np.float32)
    zero, shift, error, rest, mass = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    for _ in range(2):
        for lane in range(LANES):
            byte = np.rint(-start[lane] / (step[lane] * unit))
            zero[lane] = min(max(byte, np.float32(0.0)), np.float32(255.0))
            shift[lane] = unit * zero[lane]
        _left(w, h, step, shift, top, error, rest, mass)
        for lane in range(LANES):
            if step[lane] > 0 and error[lane] < best[0, lane]:
                best[0, lane], best[1, lane], best[2, lane] = error[lane], step[lane], zero[lane]
            start[lane] = -step[lane] * shift[lane] + rest[lane] / mass[lane]


@compiled
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
    step, start, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    nearest, found = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for begin in range(0, weights.shape[0], LANES):
        load_tile(weights, importance, first, begin, w, h)
        for lane in range(LANES):
            block = min(begin + lane, weights.shape[0] - 1)
            row = row_scale[(first + block) // blocks_per_row]
            nearest[lane] = 0
            if row > 0 and scale[block] > 0:
                steps_up = np.rint(octave * np.log2(scale[block] / row))
                nearest[lane] = int(min(max(np.float32(255.0) + steps_up, 0), 255))
            found[lane] = nearest[lane]
        best[0], best[1], best[2] = np.float32(np.inf), np.float32(0.0), np.float32(0.0)
        for away in range(-around, around + 1):
            for lane in range(LANES):
                block = min(begin + lane, weights.shape[0] - 1)
                exponent = nearest[lane] + away
                row = row_scale[(first + block) // blocks_per_row]
                step[lane] = row * steps[exponent] if 0 <= exponent <= 255 else np.float32(0.0)
                start[lane] = offset[block]
            _try_step(w, h, top, unit, step, start, best)
            for lane in range(LANES):
                if step[lane] == best[1, lane] and step[lane] > 0:
                    found[lane] = nearest[lane] + away
        for lane in range(min(LANES, weights.shape[0] - begin)):
            scale[begin + lane], zero = best[1, lane], best[2, lane]
            offset[begin + lane] = -best[1, lane] * (unit * zero)
            exponents[begin + lane], zeros[begin + lane] = found[lane], int(zero)
