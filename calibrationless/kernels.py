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

__all__ = ["search_blocks", "search_lines", "settle_lines"]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


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


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "arcp"}, error_model="numpy")
def _sums(weights: Floats, importance: Floats, inverse: np.float32, shift: np.float32, top: np.float32):  # type: ignore[no-untyped-def]
    """(sum h q, sum h q q, sum h w q) of q = clamp(rint(w * inverse + shift), 0, top): what a line through them
    needs."""
    total, square, product = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for i in range(weights.shape[0]):
        code = min(max(np.rint(weights[i] * inverse + shift), np.float32(0.0)), top)
        weighted = importance[i] * code
        total += weighted
        square += weighted * code
        product += weighted * weights[i]
    return total, square, product


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "arcp"}, error_model="numpy")
def _centered(weights: Floats, importance: Floats, out: Floats):  # type: ignore[no-untyped-def]
    """(mean, sum of importance); the weights less their weighted mean go to `out`."""
    mass, moment = np.float32(0.0), np.float32(0.0)
    for i in range(weights.shape[0]):
        mass += importance[i]
        moment += importance[i] * weights[i]
    mean = moment / mass
    for i in range(weights.shape[0]):
        out[i] = weights[i] - mean
    return mean, mass


@numba.njit(cache=True, nogil=True, error_model="numpy")
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
    period, top = importance.shape[0], np.float32(levels - 1)
    w = np.empty(weights.shape[1], np.float32)
    for block in range(weights.shape[0]):
        h = importance[(first + block) % period]
        mean, mass = _centered(weights[block], h, w)
        low, high = w[0], w[0]
        for i in range(w.shape[0]):
            low = min(low, w[i])
            high = max(high, w[i])
        scale[block], offset[block] = np.float32(0.0), mean
        if low == high:
            continue
        middle = (low + high) * np.float32(0.5)
        best, inverse, shift = np.float32(-1.0), np.float32(0.0), np.float32(0.0)
        for stretch in stretches:
            for move in shifts:
                trial = top * stretch / (high - low)
                moved = top * np.float32(0.5) + move - middle * trial
                total, square, product = _sums(w, h, trial, moved, top)
                spread = square - total * (total / mass)
                if spread > 0 and product * (product / spread) > best:
                    best, inverse, shift = product * (product / spread), trial, moved
        # The line through the best codes is not the one that they were cut with; its own codes may be better still.
        gain = np.float32(-1.0)
        for _ in range(refits + 1):
            total, square, product = _sums(w, h, inverse, shift, top)
            spread = square - total * (total / mass)
            if spread <= 0 or product <= 0 or product * (product / spread) <= gain:
                break
            gain = product * (product / spread)
            step = product / spread
            scale[block], offset[block] = step, mean - step * total / mass
            inverse = np.float32(1.0) / step
            shift = total / mass  # -offset / step of the centered weights


@numba.njit(cache=True, nogil=True, error_model="numpy")
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
    period, top = importance.shape[0], np.float32(levels - 1)
    unit = np.float32(levels) / np.float32(256.0)
    for block in range(weights.shape[0]):
        w, h = weights[block], importance[(first + block) % period]
        row = row_scale[(first + block) // blocks_per_row]
        nearest = 0
        if row > 0 and scale[block] > 0:
            nearest = int(min(max(np.float32(255.0) + np.rint(octave * np.log2(scale[block] / row)), 0), 255))
        best, found_scale, found_zero, found = np.float32(np.inf), np.float32(0.0), 0, nearest
        for exponent in range(max(nearest - around, 0), min(nearest + around, 255) + 1):
            step = row * steps[exponent]
            if step <= 0:
                continue
            start = offset[block]
            for _ in range(2):
                zero = min(max(np.rint(-start / (step * unit)), np.float32(0.0)), np.float32(255.0))
                shift = unit * zero
                error, mass, rest = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for i in range(w.shape[0]):
                    code = min(max(np.rint(w[i] / step + shift), np.float32(0.0)), top)
                    left = w[i] - step * (code - shift)
                    error += h[i] * left * left
                    rest += h[i] * left
                    mass += h[i]
                if error < best:
                    best, found_scale, found_zero, found = error, step, int(zero), exponent
                start = -step * shift + rest / mass  # the best offset for these codes
        scale[block], offset[block] = found_scale, -found_scale * (unit * np.float32(found_zero))
        exponents[block], zeros[block] = found, found_zero
