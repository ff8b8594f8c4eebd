"""What rounding cost, and which weights it cost most.

`measure` compares a weight with what its codes decode to; `worst` names the weights with the largest error, the
candidates for the sidecar. Both give the same answer for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.blocks import element_position, to_blocks
from calibrationless.loops import run_loop
from calibrationless.patches import Patch, Points, covered
from calibrationless.pieces import for_pieces
from calibrationless.quantized import QuantizedTensor, decode_blocks
from calibrationless.search import block_importance

__all__ = ["WeightError", "measure", "worst"]


@dataclass(frozen=True)
class WeightError:
    """Of one weight tensor. relative: ||w - q|| / ||w|| (0 for a tensor of zeros). largest: max |w - q|.
    output: the same ratio with every input channel weighted by its energy, the expected error of the layer's output
    (None where no energy is known)."""

    relative: float
    largest: float
    output: float | None = None


def measure(
    weight: Tensor,
    quantized: QuantizedTensor,
    *patches: Patch,
    importance: Tensor | None = None,
) -> WeightError:
    """Error of `quantized` as a stand-in for the [out, in] weight; what `patches` hold counts as exact.

    importance: float [in], the energy of every input channel."""
    original = to_blocks(weight, quantized.block)
    codes = to_blocks(quantized.codes, quantized.block)
    held = covered(patches, quantized.shape)
    exact = None if held is None else to_blocks(held, quantized.block)
    heavy = torch.ones(1, original.shape[1], device=original.device)
    if importance is not None:
        heavy = block_importance(importance, quantized.block, quantized.shape).contiguous()

    def work(piece: slice) -> Tensor:
        """float64 [5], see `passes.error_sums`."""
        decoded, weights = decode_blocks(quantized, codes[piece], piece), original[piece].to(torch.float32).contiguous()
        if exact is not None:
            decoded = torch.where(exact[piece], weights, decoded)
        sums = torch.zeros(5, dtype=torch.float64, device=weights.device)
        run_loop("error_sums", weights.device, decoded, weights, heavy, piece.start, sums)
        return sums

    parts = torch.stack(for_pieces(work, *original.shape, device=original.device))
    error, total, _, weighted_error, weighted_total = parts.sum(dim=0).tolist()
    return WeightError(
        relative=_ratio(error, total),
        largest=float(parts[:, 2].max()),
        output=None if importance is None else _ratio(weighted_error, weighted_total),
    )


def _ratio(error: float, total: float) -> float:
    return (error / total) ** 0.5 if total else 0.0


def _rows(pattern: Tensor, piece: slice) -> Tensor:
    """Importance [blocks of the piece, elements] from one period of it; a view where one row serves all."""
    if pattern.shape[0] == 1:
        return pattern
    return pattern[torch.arange(piece.start, piece.stop, device=pattern.device) % pattern.shape[0]]


def worst(
    weight: Tensor,
    quantized: QuantizedTensor,
    count: int,
    *,
    always: Sequence[tuple[int, int]] = (),
    importance: Tensor | None = None,
) -> Points:
    """The `count` weights with the largest rounding error; of equal ones, those that come first.

    importance: float [in]; with it, the largest importance * error^2. always: (row, col) of weights that come before
    all others, however well they are rounded.
    Two passes over the pieces, so that a large tensor's errors never stand in memory together: one counts how many
    errors fall into each bucket, the other collects the few that can be among the largest.
    """
    original = to_blocks(weight, quantized.block)
    codes = to_blocks(quantized.codes, quantized.block)
    count = max(0, min(count, weight.numel()))
    first = None
    if always:
        mask = torch.zeros(quantized.shape, dtype=torch.bool, device=weight.device)
        mask[tuple(torch.tensor(always).T)] = True
        first = to_blocks(mask, quantized.block)
    pattern = None if importance is None else block_importance(importance, quantized.block, quantized.shape).sqrt_()

    def errors(piece: slice) -> Tensor:
        difference = decode_blocks(quantized, codes[piece], piece).sub_(original[piece]).abs_()
        if pattern is not None:
            difference.mul_(_rows(pattern, piece))
        return (difference if first is None else difference.masked_fill_(first[piece], torch.inf)).flatten()

    def histogram(piece: slice) -> Tensor:
        return torch.bincount(_bucket(errors(piece)), minlength=_BUCKETS)

    at_least = (
        torch.stack(for_pieces(histogram, *original.shape, device=original.device))
        .sum(dim=0)
        .flip(0)
        .cumsum(dim=0)
        .flip(0)
    )
    lowest = int((at_least >= count).sum()) - 1  # the highest bucket with `count` errors in it and above

    def candidates(piece: slice) -> tuple[Tensor, Tensor]:
        found = errors(piece)
        index = torch.nonzero(_bucket(found) >= lowest).flatten()
        return found[index], index + piece.start * original.shape[1]

    values, indices = map(torch.cat, zip(*for_pieces(candidates, *original.shape, device=original.device), strict=True))
    rows, cols = element_position(indices, quantized.block, quantized.shape)
    order = torch.argsort(rows * weight.shape[1] + cols)
    order = order[torch.argsort(values[order], descending=True, stable=True)][:count]
    return Points.at(weight, rows[order], cols[order])


_BUCKETS = 1 << 13


def _bucket(errors: Tensor) -> Tensor:
    """Non-negative floats have the order of their bits read as integers; the upper ones number the buckets."""
    return errors.view(torch.int32) >> 18
