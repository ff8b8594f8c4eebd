"""The compiled search for scales and zero points: see `tiles`, which says how, and `search`, which says what for.

The tests compare it with a plain version that tries one block after the other in float64.
"""

from __future__ import annotations

import numpy as np

from calibrationless.tiles import LANES, RUN, Floats, compiled, extend_range, load_tile

__all__ = ["search_blocks"]


@compiled
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


@compiled
def _fit_all(w: Floats, h: Floats, inverse: Floats, low: Floats, high: Floats, sums: Floats) -> None:
    """The same run by run, to sums[0] and [1]; sums[2] and [3] are scratch."""
    _fit(w[:RUN], h[:RUN], inverse, low, high, sums[0], sums[1])
    for begin in range(RUN, w.shape[0], RUN):
        _fit(w[begin : begin + RUN], h[begin : begin + RUN], inverse, low, high, sums[2], sums[3])
        sums[:2] += sums[2:]


@compiled
def _try_scales(
    w: Floats,
    h: Floats,
    stretches: Floats,
    levels: int,
    shifts: int,
    symmetric: bool,
    smallest: Floats,
    largest: Floats,
    best: Floats,
    sums: Floats,
) -> None:
    """The best of all candidates of every lane, to `best`: gain, scale and zero point."""
    half, top, zero = np.float32(levels // 2), np.float32(levels - 1), np.float32(0.0)
    best_gain, best_scale, best_zero, product, square = best[0], best[1], best[2], sums[0], sums[1]
    inverse, low, high = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
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


@compiled
def _refit_scales(w: Floats, h: Floats, top: np.float32, refits: int, best: Floats, sums: Floats) -> None:
    """`best` of every lane with the scale for its own codes, as long as that is better."""
    best_gain, best_scale, best_zero, product, square = best[0], best[1], best[2], sums[0], sums[1]
    inverse, low, high = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    alive = best_scale != np.float32(0.0)
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


@compiled
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
    half, top = np.float32(levels // 2), np.float32(levels - 1)
    w, h = np.empty((weights.shape[1], LANES), np.float32), np.empty((weights.shape[1], LANES), np.float32)
    smallest, largest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    best, sums = np.empty((3, LANES), np.float32), np.empty((4, LANES), np.float32)
    for begin in range(0, weights.shape[0], LANES):
        load_tile(weights, importance, first, begin, w, h)
        smallest[:], largest[:] = np.float32(0.0), np.float32(0.0)
        extend_range(w, smallest, largest)
        _try_scales(w, h, stretches, levels, shifts, symmetric, smallest, largest, best, sums)
        _refit_scales(w, h, top, refits, best, sums)
        for lane in range(min(LANES, weights.shape[0] - begin)):
            zeros = smallest[lane] == largest[lane]  # a block of them has no range to try anything in
            scale[begin + lane] = np.float32(0.0) if zeros else best[1, lane]
            zero_point[begin + lane] = half if zeros else best[2, lane]
