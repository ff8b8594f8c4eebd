"""What rounding cost, and which weights it cost most.

`measure` compares a weight with what its codes decode to; `worst` names the weights with the largest error, the
candidates for the sidecar. Both give the same answer for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.blocks import to_blocks
from calibrationless.pieces import for_pieces, row_sum
from calibrationless.quantized import Outliers, QuantizedTensor, decode_blocks, dequantize

__all__ = ["WeightError", "measure", "worst"]


@dataclass(frozen=True)
class WeightError:
    """Of one weight tensor. relative: ||w - q|| / ||w|| (0 for a tensor of zeros). largest: max |w - q|."""

    relative: float
    largest: float


def measure(weight: Tensor, quantized: QuantizedTensor, restored: Outliers | None = None) -> WeightError:
    """Error of `quantized` as a stand-in for the [out, in] weight, `restored` weights counting as exact."""
    original = to_blocks(weight, quantized.block)
    codes = to_blocks(quantized.codes, quantized.block)
    exact = None
    if restored is not None and len(restored):
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[restored.rows.long(), restored.cols.long()] = True
        exact = to_blocks(mask, quantized.block)

    def work(piece: slice) -> Tensor:
        """float64 [3]: sum of squared errors, sum of squared weights, largest error."""
        difference = decode_blocks(quantized, codes[piece], piece).sub_(original[piece])
        if exact is not None:
            difference.masked_fill_(exact[piece], 0.0)
        return torch.stack([_square_sum(difference), _square_sum(original[piece]), difference.abs_().max().double()])

    squares = torch.stack(for_pieces(work, *original.shape))
    error, total = float(squares[:, 0].sum()), float(squares[:, 1].sum())
    return WeightError((error / total) ** 0.5 if total else 0.0, float(squares[:, 2].max()))


def _square_sum(matrix: Tensor) -> Tensor:
    """float64 scalar."""
    return row_sum(matrix.to(torch.float32).square().view(1, -1)).squeeze()


def worst(weight: Tensor, quantized: QuantizedTensor, count: int) -> Outliers:
    """The `count` weights with the largest rounding error; of equal ones, those that come first."""
    errors = dequantize(quantized, torch.float32).sub_(weight).abs_().flatten()
    count = min(count, errors.numel())
    threshold = errors.topk(count, sorted=False).values.min() if count > 0 else torch.inf
    above = torch.nonzero(errors > threshold).flatten()
    equal = torch.nonzero(errors == threshold).flatten()[: count - above.numel()]
    index = torch.cat([above, equal])
    return Outliers.at(weight, index // weight.shape[1], index % weight.shape[1])
