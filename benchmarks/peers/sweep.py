"""How large may a block be? The paper's Figure 7: rounding in blocks of 32 weights up to a whole tensor.

    rounded     min/max of each block, asymmetric
    restored    the same without the super weights, which the one prompt finds: they do not stretch their block's
                range, and have their exact values afterwards
    refined     signed symmetric scales searched with the energy that the inputs have on the one prompt, then the super
                weights and the 0.05 % of the weights that cost most have their exact values

Blocks run through the flat tensor, so that any size fits; every tensor is rounded, whatever swquant's plan would say.
Bits are codes, bfloat16 scales, 4-bit zero points where there are any, and 80 bits for every weight that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import swquant
from calibrationless import Block, QuantizedTensor, dequantize, fit, parse_block, quantize, restore, shape_of, worst
from peers.base import Cell, Method, Original, Outcome, Rounded, gather
from swquant.detect.found import Found

__all__ = ["METHODS", "SIZES", "VARIANTS"]

SIZES = ("flat:32", "flat:128", "flat:512", "flat:2048", "flat:8192", "tensor")
CELLS = tuple(Cell(4, size) for size in SIZES)
VARIANTS = ("rounded", "restored", "refined")
KEPT_BITS = 80  # row and column of 32 bits each, a value of 16
FRACTION = 0.0005


@cache
def prompted(folder: Path) -> Found:
    """What the one prompt says of a model."""
    return swquant.detect(folder)


def variant(name: str) -> Callable[[Original, Cell], Outcome]:
    def run(original: Original, cell: Cell) -> Outcome:
        found = prompted(original.folder)
        points: dict[str, list[tuple[int, int]]] = {}
        for weight in found.detection.super_weights:
            points.setdefault(weight.name, []).append((weight.row, weight.col))

        def one(tensor: str) -> Rounded:
            weight, kept = original.checkpoint.read(tensor), points.get(tensor, [])
            if name == "refined":
                return refined(weight, cell, kept, found.energy(tensor))
            return rounded(weight, cell, kept if name == "restored" else [])

        return gather((tensor, one(tensor)) for tensor in original.linears)

    return run


def block_of(weight: Tensor, cell: Cell) -> Block:
    block = fit(parse_block(cell.block), shape_of(weight))
    if block is None:
        raise ValueError(f"no block of {cell.block} divides a tensor of {list(weight.shape)}")
    return block


def stored(quantized: QuantizedTensor, kept: int) -> float:
    zero = 0 if quantized.zero_point is None else quantized.bits
    return (quantized.codes.numel() * quantized.bits + quantized.scale.numel() * (16 + zero) + KEPT_BITS * kept) / 8


def rounded(weight: Tensor, cell: Cell, kept: list[tuple[int, int]]) -> Rounded:
    """kept: (row, column) of weights that are left out of their blocks and put back."""
    rest = weight.clone()
    for row, col in kept:
        rest[row, col] = 0
    quantized = quantize(rest, block_of(weight, cell), cell.bits, symmetric=False, scale_dtype=torch.bfloat16)
    decoded = dequantize(quantized, torch.float32)
    for row, col in kept:
        decoded[row, col] = weight[row, col]
    return Rounded(decoded, stored(quantized, len(kept)))


def refined(weight: Tensor, cell: Cell, always: list[tuple[int, int]], energy: Tensor | None) -> Rounded:
    block = block_of(weight, cell)
    quantized = quantize(weight, block, cell.bits, importance=energy, scale_dtype=torch.bfloat16)
    count = max(len(always), int(FRACTION * weight.numel()))
    kept = worst(weight, quantized, count, always=always, importance=energy)
    return Rounded(restore(dequantize(quantized, torch.float32), kept), stored(quantized, count))


METHODS = [
    Method(f"sweep, {name}", ("swquant",), f"calibrationless.quantize, {name}", variant(name), CELLS)
    for name in VARIANTS
]
