"""The block types of GGUF: codes and scales as the bytes that llama.cpp reads, without rounding anything again.

    type          weights  bytes  bits   weight
    Q4_0               32     18  4.5    scale * (code - 8)
    Q5_0               32     22  5.5    scale * (code - 16)
    Q8_0               32     34  8.5    scale * (code - 128)
    Q4_1               32     20  5      scale * code + offset
    Q5_1               32     24  6      scale * code + offset
    Q4_K, Q5_K  8 of   32    144, 176    4.5, 5.5    (step * integer) * code - low * integer
    Q6_K       16 of   16    210  6.5625 (step * integer) * (code - 32)

A `QuantizedTensor` that one of them can hold becomes bytes by `encode`; `type_of` says which, or why none. The layouts
are those of `block_q4_0` … `block_q6_K` in ggml-common.h; the tests decode all of them with the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless import Group, QuantizedTensor, Recipe
from calibrationless.super_blocks import SUPER_BLOCK, SUPER_KINDS

__all__ = ["TYPES", "BlockType", "encode", "recipe_type", "type_of"]


@dataclass(frozen=True)
class BlockType:
    """block: weights that share a scale. offsets: as in `Recipe`. weights: of one unit of bytes. nbytes: of that unit.
    fallback: the type for rows that `weights` does not divide. number, file_type: of ggml_type and llama_ftype."""

    name: str
    bits: int
    block: int
    offsets: str
    weights: int
    nbytes: int
    fallback: str | None
    number: int
    file_type: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    def row_bytes(self, inputs: int) -> int:
        """Of a row of so many weights."""
        return inputs // self.weights * self.nbytes


_ROWS = (
    BlockType("Q4_0", 4, 32, "none", 32, 18, None, 2, 2),
    BlockType("Q4_1", 4, 32, "float", 32, 20, None, 3, 3),
    BlockType("Q5_0", 5, 32, "none", 32, 22, None, 6, 8),
    BlockType("Q5_1", 5, 32, "float", 32, 24, None, 7, 9),
    BlockType("Q8_0", 8, 32, "none", 32, 34, None, 8, 7),
    BlockType("Q4_K", 4, 32, "super", SUPER_BLOCK, 144, "Q4_1", 12, 14),
    BlockType("Q5_K", 5, 32, "super", SUPER_BLOCK, 176, "Q5_1", 13, 16),
    BlockType("Q6_K", 6, 16, "super", SUPER_BLOCK, 210, "Q8_0", 14, 18),
)
TYPES = {row.name: row for row in _ROWS}


def recipe_type(recipe: Recipe) -> BlockType | None:
    """The type that holds what a recipe makes, None where there is none."""
    for row in _ROWS:
        if (row.bits, row.offsets) == (recipe.bits, recipe.offsets) and recipe.block == Group(row.block):
            return row
    return None


def type_of(quantized: QuantizedTensor) -> BlockType | str:
    """The type that holds a rounded weight as it is, or why there is none and what would fit."""
    if quantized.super_blocks is not None:
        return next(row for row in _ROWS if row.offsets == "super" and row.bits == quantized.bits)
    if quantized.zero_point is not None:
        return "has integer zero points; compress with --symmetric or --offsets float"
    if quantized.compact is not None:
        return "has offsets of a byte; compress with --offsets float"
    offsets = "none" if quantized.offset is None else "float"
    known = [row for row in _ROWS if row.offsets == offsets]
    if quantized.bits not in {row.bits for row in known}:
        bits = ", ".join(str(row.bits) for row in known)
        return f"has codes of {quantized.bits} bits; a GGUF block holds {bits}{' with offsets' if offsets == 'float' else ''}"
    size = quantized.shape[1] // quantized.scale.shape[-1] if quantized.scale.ndim == 2 else 0
    if quantized.scale.ndim != 2 or quantized.scale.shape[0] != quantized.shape[0] or size % 32:
        return f"has scales for blocks of {quantized.block}; a GGUF block is 32 inputs: compress with --block 32"
    for name in ("scale", "offset"):
        values = getattr(quantized, name)
        if values is not None and not torch.equal(values.to(torch.float16).to(torch.float32), values.to(torch.float32)):
            return f"has a {name} that float16 does not hold exactly; compress with --dtype float16"
    return next(row for row in known if row.bits == quantized.bits)


def encode(quantized: QuantizedTensor, kind: BlockType) -> Tensor:
    """uint8 [out, bytes of a row]: a weight that `type_of` says this type holds. Larger blocks repeat their scale."""
    return _ENCODERS[kind.name](quantized)


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] -> uint8 [..., size of dtype]."""
    stored = values.to(dtype).contiguous()
    return stored.view(torch.uint8).view(*stored.shape, dtype.itemsize)


def _per_32(values: Tensor, codes: Tensor) -> Tensor:
    """[out, blocks] -> [out, in / 32]."""
    return values.repeat_interleave(codes.shape[1] // 32 // values.shape[1], dim=1)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """[..., 2 * width] -> [..., width]: the first half low, the second half high."""
    return (codes[..., :width] & 15) | (codes[..., width:] & 15) << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """[..., 32] -> [..., 4]: bit i of the 32 is the highest of code i."""
    bits = (codes >> 4).view(*codes.shape[:-1], 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


def _simple(quantized: QuantizedTensor) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, offset if any, fifth bits if any, nibbles."""
    codes = quantized.codes.view(quantized.shape[0], -1, 32)
    parts = [_bytes(_per_32(quantized.scale, quantized.codes), torch.float16)]
    if quantized.offset is not None:
        parts.append(_bytes(_per_32(quantized.offset, quantized.codes), torch.float16))
    if quantized.bits == 5:
        parts.append(_fifth_bits(codes))
    return torch.cat([*parts, _nibbles(codes, 16)], dim=-1).flatten(1)


def _q8_0(quantized: QuantizedTensor) -> Tensor:
    codes = (quantized.codes ^ 128).view(quantized.shape[0], -1, 32)  # unsigned around 128 -> two's complement
    return torch.cat([_bytes(_per_32(quantized.scale, quantized.codes), torch.float16), codes], dim=-1).flatten(1)


def _six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """Two times eight integers of 6 bits -> 12 bytes: four of each whole, the others' low halves behind them and their
    high bits on top."""
    first = (scales[..., :4] & 63) | (scales[..., 4:] >> 4) << 6
    second = (mins[..., :4] & 63) | (mins[..., 4:] >> 4) << 6
    return torch.cat([first, second, (scales[..., 4:] & 15) | (mins[..., 4:] & 15) << 4], dim=-1)


def _with_offsets(quantized: QuantizedTensor) -> Tensor:
    """Q4_K and Q5_K."""
    parts = quantized.super_blocks
    assert parts is not None
    assert parts.lows is not None
    assert parts.mins is not None
    rows, supers = parts.steps.shape
    codes = quantized.codes.view(rows, supers, 8, 32)
    scales, mins = parts.scales.to(torch.uint8).view(rows, supers, 8), parts.mins.view(rows, supers, 8)
    pieces = [_bytes(parts.steps, torch.float16), _bytes(parts.lows, torch.float16), _six_bits(scales, mins)]
    if quantized.bits == 5:  # bit b of byte i is the highest of code i of block b
        high = (codes >> 4) << torch.arange(8, dtype=torch.uint8).view(8, 1)
        pieces.append(high.sum(dim=2, dtype=torch.uint8))
    low = _nibbles(codes.view(rows, supers, 4, 64), 32)
    return torch.cat([*pieces, low.flatten(2)], dim=-1).flatten(1)


def _q6_k(quantized: QuantizedTensor) -> Tensor:
    parts = quantized.super_blocks
    assert parts is not None
    rows, supers = parts.steps.shape
    codes = quantized.codes.view(rows, supers, 2, 4, 32)  # of each half: four quarters, whose bits are interleaved
    low = _nibbles(codes.view(rows, supers, 2, 128), 64)
    high = ((codes >> 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)).sum(dim=3, dtype=torch.uint8)
    scales = _bytes(parts.scales.view(rows, supers, 16), torch.int8).flatten(2)
    return torch.cat([low.flatten(2), high.flatten(2), scales, _bytes(parts.steps, torch.float16)], dim=-1).flatten(1)


_ENCODERS: dict[str, Callable[[QuantizedTensor], Tensor]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), _simple),
    "Q8_0": _q8_0,
    "Q4_K": _with_offsets,
    "Q5_K": _with_offsets,
    "Q6_K": _q6_k,
}
assert {row.bits for row in _ROWS if row.offsets == "super"} == set(SUPER_KINDS)
