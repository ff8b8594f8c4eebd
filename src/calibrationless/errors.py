"""What rounding cost, and which weights it cost most.

`measure` compares a weight with what its codes decode to; `worst` names the weights with the largest
error, the candidates for the sidecar. Both go through the weight in pieces and give the same answer
for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.blocks import to_blocks
from calibrationless.quantized import Outliers, QuantizedTensor, dequantize

__all__ = ["WeightError", "measure", "worst"]

_PIECE = 1 << 19


@dataclass(frozen=True)
class WeightError:
    """Of one weight tensor. relative: ||w - q|| / ||w|| (0 for a tensor of zeros). largest: max |w - q|."""

    relative: float
    largest: float


def _pieces(weight: Tensor, quantized: QuantizedTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(original, decoded) float32 pairs [blocks, elements] that together make the weight."""
    original = to_blocks(weight, quantized.block)
    codes = to_blocks(quantized.codes, quantized.block)
    scale = quantized.scale.reshape(-1, 1)
    zero = None if quantized.zero_point is None else quantized.zero_point.reshape(-1, 1)
    step = max(1, _PIECE // original.shape[1])
    for start in range(0, original.shape[0], step):
        rows = slice(start, start + step)
        decoded = codes[rows].to(torch.float32)
        decoded.sub_(float(1 << (quantized.bits - 1)) if zero is None else zero[rows].to(torch.float32))
        decoded.mul_(scale[rows].to(torch.float32))
        if scale.dtype is not torch.float32:
            decoded = decoded.to(scale.dtype).to(torch.float32)
        yield original[rows].to(torch.float32), decoded


def measure(weight: Tensor, quantized: QuantizedTensor, restored: Outliers | None = None) -> WeightError:
    """Error of `quantized` as a stand-in for the [out, in] weight, `restored` weights counting as exact."""
    error = total = largest = 0.0
    exact = None
    if restored is not None and len(restored):
        decoded = dequantize(quantized, torch.float32)
        gone = (decoded[restored.rows.long(), restored.cols.long()] - restored.values.to(torch.float32)).double()
        exact = float(gone.square().sum())
        decoded[restored.rows.long(), restored.cols.long()] = restored.values.to(torch.float32)
    for original, approximate in _pieces(weight, quantized):
        total += float(original.square().sum(dim=1).sum(dtype=torch.float64))
        difference = original.sub_(approximate)
        error += float(difference.square().sum(dim=1).sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs_().max()))
    if exact is not None:
        error = max(error - exact, 0.0)
        largest = float((weight.to(torch.float32) - decoded).abs().max())
    return WeightError((error / total) ** 0.5 if total else 0.0, largest)


def worst(weight: Tensor, quantized: QuantizedTensor, count: int) -> Outliers:
    """The `count` weights with the largest rounding error; of equal ones, those that come first."""
    if count <= 0:
        none = torch.empty(0, dtype=torch.int64)
        return Outliers.at(weight, none, none)
    errors = (dequantize(quantized, torch.float32) - weight.to(torch.float32)).abs_().flatten()
    count = min(count, errors.numel())
    threshold = errors.topk(count, sorted=False).values.min()
    above = torch.nonzero(errors > threshold).flatten()
    equal = torch.nonzero(errors == threshold).flatten()[: count - above.numel()]
    index = torch.cat([above, equal])
    return Outliers.at(weight, index // weight.shape[1], index % weight.shape[1])
