"""The loops of `kernels` and its neighbours as batched torch: all blocks at once, one candidate after the other.

They run on any device. Every function takes what its namesake takes, as tensors, and writes to the same outputs. What
the compiled loops decide block by block with `if` and `break` is a mask here. The tests hold the two against each
other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from calibrationless.pieces import row_sum

__all__ = ["block_extremes", "cut_blocks", "error_sums", "search_blocks", "search_lines", "settle_lines"]


def _importance_of(importance: Tensor, first: int, blocks: int) -> Tensor:
    """[blocks, elements] of [period, elements], or [1, elements] where one row serves all."""
    period = importance.shape[0]
    if period == 1:
        return importance
    return importance[torch.arange(first, first + blocks, device=importance.device) % period]


def _between(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """values, in place, cut to what may differ from block to block: [blocks, 1]."""
    return values.clamp_(min=low).clamp_(max=high)


def _where(better: Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """For each (kept, found): kept becomes found where it is better."""
    for kept, found in pairs:
        kept.copy_(torch.where(better, found, kept))


def search_blocks(
    weights: Tensor,
    importance: Tensor,
    first: int,
    stretches: Tensor,
    levels: int,
    shifts: int,
    symmetric: bool,
    refits: int,
    scale: Tensor,
    zero_point: Tensor,
) -> None:
    """See `kernels.search_blocks`."""
    h = _importance_of(importance, first, len(weights))
    half, top = float(levels // 2), float(levels - 1)
    smallest = weights.amin(dim=1, keepdim=True).clamp_(max=0.0)
    largest = weights.amax(dim=1, keepdim=True).clamp_(min=0.0)
    best_gain, best_scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)
    best_zero = torch.full_like(largest, half)

    def fit(inverse: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum h w q, sum h q q, what both gain) of q = clamp(round(w * inverse), -zero, top - zero)."""
        codes = _between(torch.mul(weights, inverse).round_(), -zero, top - zero)
        weighted = codes * h
        square = codes.mul_(weighted).sum(dim=1, keepdim=True)
        product = weighted.mul_(weights).sum(dim=1, keepdim=True)
        return product, square, product * (product / square)

    for stretch in stretches.tolist():
        for inverse, zero in _trials(smallest, largest, stretch, top, shifts, symmetric):
            product, square, gain = fit(inverse, zero)
            # Not a number where a block holds zeros alone: no comparison is true of it, and the scale stays 0.
            _where(
                (square > 0) & (gain > best_gain), (best_gain, gain), (best_scale, product / square), (best_zero, zero)
            )
    open_still = best_scale != 0
    for _ in range(refits):
        product, square, gain = fit(1.0 / best_scale, best_zero)
        open_still = open_still & (square > 0) & (gain > best_gain)
        _where(open_still, (best_gain, gain), (best_scale, product / square))
    scale.copy_(best_scale.squeeze(1))
    zero_point.copy_(best_zero.squeeze(1))


def _trials(
    smallest: Tensor, largest: Tensor, stretch: float, top: float, shifts: int, symmetric: bool
) -> Iterable[tuple[Tensor, Tensor]]:
    """(inverse scale, zero point) [blocks, 1] that are tried for a stretch, in the order of the compiled loop."""
    if symmetric:
        half = (top + 1) / 2
        inverse = torch.full_like(largest, half).mul_(stretch) / torch.maximum(largest, -smallest)
        zero = torch.full_like(largest, half)
        yield from ((-inverse, zero), (inverse, zero))
        return
    inverse = torch.full_like(largest, top).mul_(stretch) / (largest - smallest)
    middle = (top - (largest + smallest) * inverse) * 0.5
    for trial in range(2 * shifts + 1):
        yield inverse, (middle.round() + float(trial - shifts)).clamp_(0.0, top)


def search_lines(
    weights: Tensor,
    importance: Tensor,
    first: int,
    stretches: Tensor,
    shifts: Tensor,
    levels: int,
    refits: int,
    scale: Tensor,
    offset: Tensor,
) -> None:
    """See `line_kernels.search_lines`."""
    h = _importance_of(importance, first, len(weights))
    top = float(levels - 1)
    mass = h.sum(dim=1, keepdim=True)
    mean = (h * weights).sum(dim=1, keepdim=True) / mass
    w = weights - mean
    low, high = w.amin(dim=1, keepdim=True), w.amax(dim=1, keepdim=True)
    middle = (low + high) * 0.5

    def fit(inverse: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum h q, sum h w q, spread of q) of q = clamp(round(w * inverse + shift), 0, top)."""
        codes = torch.mul(w, inverse).add_(shift).round_().clamp_(0.0, top)
        weighted = codes * h
        total = weighted.sum(dim=1, keepdim=True)
        square = codes.mul_(weighted).sum(dim=1, keepdim=True)
        product = weighted.mul_(w).sum(dim=1, keepdim=True)
        return total, product, square - total * (total / mass)

    best, inverse, shift = torch.full_like(low, -1.0), torch.zeros_like(low), torch.zeros_like(low)
    for stretch in stretches.tolist():
        trial = torch.full_like(low, top).mul_(stretch) / (high - low)
        for move in shifts.tolist():
            moved = (top * 0.5 + move) - middle * trial
            _, product, spread = fit(trial, moved)
            gain = product * (product / spread)
            _where((spread > 0) & (gain > best), (best, gain), (inverse, trial), (shift, moved))
    found, line = torch.zeros_like(low), mean.clone()
    gained, open_still = torch.full_like(low, -1.0), low != high
    for _ in range(refits + 1):
        total, product, spread = fit(inverse, shift)
        gain = product * (product / spread)
        open_still = open_still & (spread > 0) & (product > 0) & (gain > gained)
        step = product / spread
        _where(open_still, (gained, gain), (found, step), (line, mean - step * total / mass))
        _where(open_still, (inverse, 1.0 / step), (shift, total / mass))
    scale.copy_(found.squeeze(1))
    offset.copy_(line.squeeze(1))


def settle_lines(
    weights: Tensor,
    importance: Tensor,
    first: int,
    levels: int,
    around: int,
    octave: int,
    steps: Tensor,
    row_scale: Tensor,
    blocks_per_row: int,
    scale: Tensor,
    offset: Tensor,
    exponents: Tensor,
    zeros: Tensor,
) -> None:
    """See `line_kernels.settle_lines`."""
    count, h = len(weights), _importance_of(importance, first, len(weights))
    top, unit = float(levels - 1), levels / 256
    mass = h.sum(dim=1, keepdim=True)
    rows = torch.arange(first, first + count, device=weights.device) // blocks_per_row
    row = row_scale[rows].unsqueeze(1)
    old_scale, old_offset = scale.unsqueeze(1), offset.unsqueeze(1)
    octaves = torch.log2(old_scale / row).to(torch.float64).mul_(octave).round_().add_(255.0).clamp_(0.0, 255.0)
    nearest = torch.where((row > 0) & (old_scale > 0), octaves, torch.zeros_like(octaves)).to(torch.int64)
    best, found_scale = torch.full_like(row, torch.inf), torch.zeros_like(row)
    found_zero, found = torch.zeros_like(row), nearest.clone()
    for distance in range(-around, around + 1):
        exponent = nearest + distance
        there = (exponent >= 0) & (exponent <= 255)
        step = row * steps[exponent.clamp(0, 255)]
        there &= step > 0
        start = old_offset
        for _ in range(2):
            zero = (-start / (step * unit)).round_().clamp_(0.0, 255.0)
            shift = zero * unit
            codes = torch.div(weights, step).add_(shift).round_().clamp_(0.0, top)
            left = weights - codes.sub_(shift).mul_(step)
            rest = (left * h).sum(dim=1, keepdim=True)
            error = left.square_().mul_(h).sum(dim=1, keepdim=True)
            better = there & (error < best)
            _where(better, (best, error), (found_scale, step), (found_zero, zero), (found, exponent))
            start = -step * shift + rest / mass
    scale.copy_(found_scale.squeeze(1))
    offset.copy_((-found_scale * (found_zero * unit)).squeeze(1))
    exponents.copy_(found.squeeze(1))
    zeros.copy_(found_zero.squeeze(1))


def block_extremes(weights: Tensor, low: Tensor, high: Tensor) -> None:
    """See `passes.block_extremes`."""
    low.copy_(weights.amin(dim=1))
    high.copy_(weights.amax(dim=1))


def cut_blocks(weights: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, levels: int, codes: Tensor) -> None:
    """See `passes.cut_blocks`."""
    steps = weights.sub(offset.unsqueeze(1)).div_(scale.unsqueeze(1)).round_().add_(zero_point.unsqueeze(1))
    codes.copy_(steps.clamp_(0, levels - 1).to(torch.int16))  # a cast from float to bytes is five times slower


def error_sums(decoded: Tensor, weights: Tensor, importance: Tensor, first: int, sums: Tensor) -> None:
    """See `passes.error_sums`."""
    h = _importance_of(importance, first, len(weights))
    difference = torch.sub(decoded, weights).abs_()
    largest = difference.max().double()
    own, total = weights.square(), []
    for squares in (difference.square_(), own):
        total += [row_sum(squares.view(1, -1)).squeeze(), row_sum(squares.mul_(h).view(1, -1)).squeeze()]
    sums.copy_(torch.stack([total[0], total[2], largest, total[1], total[3]]))
