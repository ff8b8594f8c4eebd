"""The loop of `super_kernels` as batched torch: all super-blocks at once, one trial after the other, on any device.

What the compiled loop decides with `if` and `break` is a mask here; the tests hold the two against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["settle_super_blocks"]

_LARGEST = 65504.0  # of float16


def _half(values: Tensor) -> Tensor:
    """The nearest float16, as a float32; beyond the largest, that."""
    return values.clamp(-_LARGEST, _LARGEST).to(torch.float16).to(torch.float32)


def settle_super_blocks(
    weights: Tensor,
    importance: Tensor,
    first: int,
    levels: int,
    signed: bool,
    limit: int,
    stretches: Tensor,
    rounds: int,
    scale: Tensor,
    offset: Tensor,
    units: Tensor,
    unit_lows: Tensor,
    scales: Tensor,
    mins: Tensor,
) -> None:
    """See `super_kernels.settle_super_blocks`."""
    supers, blocks = scale.shape
    w = weights.view(supers, blocks, -1)
    rows = torch.arange(first, first + supers, device=weights.device) % len(importance)
    h = importance[rows].view_as(w)
    low = -float(levels // 2) if signed else 0.0
    high, smallest = low + levels - 1, -limit if signed else 0
    largest = scale.abs().amax(dim=1, keepdim=True)
    lowest = (-offset).amax(dim=1, keepdim=True).clamp_(min=0.0)
    best = torch.full_like(largest, torch.inf)
    for stretch in stretches.tolist():
        unit = _half(largest / limit * stretch)
        unit_low = torch.zeros_like(unit) if signed else _half(lowest / limit)
        open_still = torch.ones_like(unit, dtype=torch.bool)
        for _ in range(rounds + 1):
            error, found, least = _settle(w, h, (low, high), (smallest, limit), unit, unit_low, scale, offset)
            better = open_still & (error < best)
            best = torch.where(better, error, best)
            units.copy_(torch.where(better, unit, units.unsqueeze(1)).squeeze(1))
            unit_lows.copy_(torch.where(better, unit_low, unit_lows.unsqueeze(1)).squeeze(1))
            scales.copy_(torch.where(better, found.to(scales.dtype), scales))
            mins.copy_(torch.where(better, least.to(mins.dtype), mins))
            unit, unit_low = _refit(w, h, (low, high), unit, unit_low, found, least)
            open_still = open_still & (unit >= 0) & (unit_low >= 0)


def _settle(
    w: Tensor,
    h: Tensor,
    codes: tuple[float, float],
    integers: tuple[int, int],
    unit: Tensor,
    unit_low: Tensor,
    start_scale: Tensor,
    start_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(error [supers, 1], scales, mins [supers, blocks], both as floats) for given units [supers, 1]. codes, integers:
    their smallest and largest."""
    mass = h.sum(dim=2)
    nearest = (start_scale / unit).round_().clamp_(*integers).masked_fill_(unit == 0, 0.0)
    best, kept, kept_low = torch.full_like(nearest, torch.inf), nearest, torch.zeros_like(nearest)
    for distance in (-1, 0, 1):
        trial = nearest + distance
        there = (trial >= integers[0]) & (trial <= integers[1])
        step, wanted = unit * trial, start_offset
        for _ in range(2):
            least = (-wanted / unit_low).round_().clamp_(0, integers[1]).masked_fill_(unit_low == 0, 0.0)
            line = -unit_low * least
            left = w - line.unsqueeze(2)
            inverse = (1.0 / step).masked_fill_(step == 0, 0.0).unsqueeze(2)
            left.sub_((left * inverse).round_().clamp_(*codes).mul_(step.unsqueeze(2)))
            weighted = left * h
            wanted = line + weighted.sum(dim=2) / mass
            error = weighted.mul_(left).sum(dim=2)
            better = there & (error < best)
            best, kept = torch.where(better, error, best), torch.where(better, trial, kept)
            kept_low = torch.where(better, least, kept_low)
    return best.sum(dim=1, keepdim=True), kept, kept_low


def _refit(
    w: Tensor, h: Tensor, codes: tuple[float, float], unit: Tensor, unit_low: Tensor, scales: Tensor, mins: Tensor
) -> tuple[Tensor, Tensor]:
    """Both units [supers, 1] by weighted least squares, in float64."""
    step = (unit * scales).unsqueeze(2)
    code = ((w + (unit_low * mins).unsqueeze(2)) / step).round_().clamp_(*codes)
    a = code.masked_fill_(step == 0, 0.0).to(torch.float64).mul_(scales.unsqueeze(2))
    b = -mins.to(torch.float64)
    mass, heavy = h.sum(dim=2, dtype=torch.float64), a * h

    def total(of_blocks: Tensor) -> Tensor:
        return of_blocks.sum(dim=1, keepdim=True)

    aa, ab, wa = total((heavy * a).sum(dim=2)), total(heavy.sum(dim=2) * b), total((heavy * w).sum(dim=2))
    bb, wb = total(mass * b * b), total((w * h).sum(dim=2, dtype=torch.float64) * b)
    determinant = aa * bb - ab * ab
    both = (bb > 0) & (determinant > 1e-12 * aa * bb)
    slope = torch.where(both, (wa * bb - wb * ab) / determinant, wa / aa)
    line = torch.where(both, (wb * aa - wa * ab) / determinant, wb / bb)
    return (
        torch.where(aa > 0, _half(slope), unit),
        torch.where(both | ((aa <= 0) & (bb > 0)), _half(line), unit_low),
    )
