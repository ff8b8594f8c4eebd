"""Rounded codes, and what they stand for.

`QuantizedTensor` is the canonical object of the house. Rounding produces it, every exporter
translates from it, every reader rebuilds it. Its codes are unsigned for every scheme, so packing never
has to know whether a scheme is symmetric:

    weight = (codes - zero_point) * scale          zero_point = 2^(bits-1) where none is stored
    weight = codes * scale + offset                where there is an offset (see `affine`)

What codes cannot hold is laid over the decoded weight: see `patches`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.blocks import Block, from_blocks, scale_shape, to_blocks
from calibrationless.pieces import for_pieces

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "Compact",
    "QuantizedTensor",
    "SuperBlocks",
    "check_bits",
    "dequantize",
    "from_compact",
]

MIN_BITS, MAX_BITS = 2, 8
OCTAVE = 24  # values of a compact scale from one power of two to the next


def check_bits(bits: int) -> None:
    """Raise ValueError unless `bits` is a width that codes can have (2 to 8)."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits {bits} is outside {MIN_BITS} to {MAX_BITS}; use 4 for size or 8 for fidelity")


@dataclass(frozen=True)
class Compact:
    """Scales and offsets of blocks in two bytes each.

        scale  = rows[row] * 2^(-(255 - exponent) / 24)        offset = -scale * zero * 2^bits / 256

    rows: float16 [out]. exponents, zeros: uint8, shaped like the scale of the tensor.
    """

    rows: Tensor
    exponents: Tensor
    zeros: Tensor


@dataclass(frozen=True)
class SuperBlocks:
    """Scales and offsets of blocks as integers, counted in two floats that 256 neighbours share (GGUF's k-quants).

        scale  = steps[super] * scales[block]      offset = -lows[super] * mins[block]

    steps, lows: float16 [out, in / 256]. scales: int16 in 0 .. 63, or -127 .. 127 where there are no offsets; mins:
    uint8 in 0 .. 63; both shaped like the scale of the tensor. lows, mins: None where there are no offsets.
    """

    steps: Tensor
    scales: Tensor
    lows: Tensor | None = None
    mins: Tensor | None = None


@dataclass(frozen=True)
class QuantizedTensor:
    """A [out, in] weight rounded to `bits`.

    codes: uint8 [out, in], each in 0 .. 2^bits - 1.
    scale: float, `scale_shape(block, shape)`; negative where a block's largest magnitude is positive.
    zero_point: uint8 like scale, or None for symmetric schemes (then it is 2^(bits-1) everywhere).
    offset: float like scale, what the code 0 stands for, or None where there is a zero point. compact: scale and offset
    as two bytes each, where they are stored so. super_blocks: both as integers, where they are stored so; scale and
    offset are then float32.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block: Block
    bits: int
    offset: Tensor | None = None
    compact: Compact | None = None
    super_blocks: SuperBlocks | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.zero_point is not None and self.offset is not None:
            raise ValueError("a block has a zero point or an offset, not both")
        for name in ("zero_point", "offset"):
            values = getattr(self, name)
            if values is not None and values.shape != self.scale.shape:
                raise ValueError(f"{name} {list(values.shape)} is not shaped like scale {list(self.scale.shape)}")
        expected = scale_shape(self.block, self.shape)
        if tuple(self.scale.shape) != expected:
            raise ValueError(
                f"scale has shape {list(self.scale.shape)}, block {self.block} of a {list(self.shape)} weight "
                f"needs {list(expected)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None and self.offset is None


def compact_steps() -> Tensor:
    """float32 [256]: the factor that each exponent stands for."""
    exponent = torch.arange(256, dtype=torch.float64)
    return torch.exp2(-(255 - exponent) / OCTAVE).to(torch.float32)


def from_compact(codes: Tensor, compact: Compact, block: Block, bits: int) -> QuantizedTensor:
    """The weight that codes and the bytes of their blocks stand for; scale and offset are float32."""
    scale = (
        compact.rows.to(torch.float32).unsqueeze(1)
        * compact_steps().to(codes.device)[compact.exponents.to(torch.int64)]
    )
    offset = -scale * (compact.zeros.to(torch.float32) * ((1 << bits) / 256))
    return QuantizedTensor(codes, scale, None, block, bits, offset, compact)


def decode_blocks(quantized: QuantizedTensor, codes: Tensor, piece: slice) -> Tensor:
    """float32 values of some blocks: codes uint8 [blocks, elements], `piece` their place among all blocks.

    The product is rounded once, to the scale's dtype, exactly as compressed-tensors does.
    """
    scale = quantized.scale.reshape(-1, 1)[piece]
    values = codes.to(torch.float32)
    if quantized.compact is not None:  # as runtimes do it: the difference is exact, and the product rounded once
        zeros = quantized.compact.zeros.reshape(-1, 1)[piece].to(torch.float32)
        return values.sub_(zeros.mul_((1 << quantized.bits) / 256)).mul_(scale)
    if quantized.offset is not None:
        values.mul_(scale).add_(quantized.offset.reshape(-1, 1)[piece])
        return values if scale.dtype is torch.float32 else values.to(scale.dtype).to(torch.float32)
    if quantized.zero_point is None:
        values.sub_(1 << (quantized.bits - 1))
    else:
        values.sub_(quantized.zero_point.reshape(-1, 1)[piece])
    values.mul_(scale)
    return values if scale.dtype is torch.float32 else values.to(scale.dtype).to(torch.float32)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """[out, in] weight that the codes stand for, in the scale's dtype, equal to a stock loader's bit for bit.

    `dtype` casts the result.
    """
    codes = to_blocks(quantized.codes, quantized.block)
    weight = torch.empty(codes.shape, dtype=dtype or quantized.scale.dtype, device=codes.device)

    def work(piece: slice) -> None:
        weight[piece] = decode_blocks(quantized, codes[piece], piece)

    for_pieces(work, *codes.shape, device=codes.device)
    return from_blocks(weight, quantized.block, quantized.shape)
