"""How large may a block be? The paper's Figure 7: asymmetric rounding in blocks of 32 weights up to a whole tensor.

    rounded     min/max of each block
    restored    the same without the super weights, which the one prompt finds: they do not stretch their block's
                range, and have their exact values afterwards
    outliers    the same without the super weights and the largest 0.05 % of each tensor

Blocks run through the flat tensor, so that any size fits; every tensor is rounded, whatever swquant's plan would say.
Bits are codes, bfloat16 scales, 4-bit zero points, and 80 bits for every weight that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import swquant
from calibrationless import dequantize, fit, parse_block, quantize
from peers.base import Cell, Method, Original, Outcome, Rounded, gather

__all__ = ["METHODS", "SIZES", "VARIANTS"]

SIZES = ("flat:32", "flat:128", "flat:512", "flat:2048", "flat:8192", "tensor")
VARIANTS = {"rounded": (False, 0.0), "restored": (True, 0.0), "outliers": (True, 0.0005)}
CELLS = tuple(Cell(4, size) for size in SIZES)
KEPT_BITS = 80  # row and column of 32 bits each, a value of 16


@cache
def super_weights(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Name of a tensor -> (row, column) of its super weights."""
    found: dict[str, list[tuple[int, int]]] = {}
    for weight in swquant.detect(folder).detection.super_weights:
        found.setdefault(weight.name, []).append((weight.row, weight.col))
    return found


def round_one(weight: Tensor, cell: Cell, kept: Tensor) -> Rounded:
    """kept: int64 [n], positions in the flat tensor that are left out and put back."""
    block = fit(parse_block(cell.block), (weight.shape[0], weight.shape[1]))
    if block is None:
        raise ValueError(f"no block of {cell.block} divides a tensor of {list(weight.shape)}")
    rest = weight.flatten().index_fill(0, kept, 0.0).view_as(weight)
    quantized = quantize(rest, block, cell.bits, symmetric=False, scale_dtype=torch.bfloat16)
    decoded = dequantize(quantized, torch.float32).flatten()
    decoded[kept] = weight.flatten()[kept]
    bits = weight.numel() * cell.bits + quantized.scale.numel() * (16 + cell.bits) + KEPT_BITS * len(kept)
    return Rounded(decoded.view_as(weight), bits / 8)


def variant(restored: bool, fraction: float) -> Callable[[Original, Cell], Outcome]:
    def run(original: Original, cell: Cell) -> Outcome:
        points = super_weights(original.folder) if restored else {}

        def one(name: str) -> Rounded:
            weight = original.checkpoint.read(name)
            largest = weight.abs().flatten().topk(int(fraction * weight.numel())).indices
            own = torch.tensor([row * weight.shape[1] + col for row, col in points.get(name, ())], dtype=torch.int64)
            return round_one(weight, cell, torch.cat([largest, own]).unique())

        return gather((name, one(name)) for name in original.linears)

    return run


METHODS = [
    Method(f"sweep, {name}", ("swquant",), f"calibrationless.quantize, {name}", variant(*how), CELLS)
    for name, how in VARIANTS.items()
]
