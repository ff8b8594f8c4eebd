"""How a quantized linear layer becomes a node of an ONNX graph.

Two operators can hold it:

    com.microsoft::MatMulNBits   of ONNX Runtime: 2, 4 or 8 bits, one scale for 16, 32, 64, 128 or 256 inputs
    swquant::LinearNBits         ours: every number of bits and every block, and outliers added to the product

MatMulNBits is taken wherever it can say everything, but for 8 bits, where ours is as fast or much faster (at accuracy
level 0, many times), and for long blocks at level 4, where ours rounds activations more finely and is faster; a runtime
without our library comes to the same node through the function. A block that it does not know is cut into pieces that
it does, the scale repeated: a row of 1,536 weights with one scale becomes six blocks of 256. LinearNBits takes what has
outliers, real offsets, channels that level 4 may not round, 3, 5, 6 or 7 bits, or a block that no power of two from 16
on divides; `function` gives it a meaning on runtimes that do not have our library.

An offset is a zero point between two codes, a float, or, where the checkpoint has it in a byte, that byte; then the
scale is one, too, and both become numbers when a kernel is created.

Both store codes as a little-endian stream of bits, each row padded to whole blocks, so for the bits and blocks that
MatMulNBits takes the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from calibrationless import Blocks, Channel, Group, Points, QuantizedTensor, check_patch, dequantize
from exporters.onnx.trained import TrainedBlocks, taken, trained_blocks
from exporters.onnx.trained import joined as join_blocks
from exporters.ops import DOMAIN, OPERATOR
from exporters.packing import pack

__all__ = [
    "DOMAIN",
    "MICROSOFT",
    "OPERATOR",
    "STOCK_BITS",
    "PackedWeight",
    "narrowed",
    "pack_weight",
    "stack",
    "stock_block",
    "take_rows",
    "with_zero_points",
]

MICROSOFT = "com.microsoft"
STOCK_BITS = (2, 4, 8)
# Both round activations with one scale per block at level 4, ours in pieces of 32 where it is longer.
_ROUNDED = 32
_SMALLEST, _LARGEST = 16, 256  # blocks of MatMulNBits; runtimes before 1.32 return zeros or NaN above, in silence


@dataclass(frozen=True)
class PackedWeight:
    """A [N, K] weight as the operators take it.

    codes: uint8 [N, blocks * block * bits / 8, rounded up]. scales: [N, blocks] of the graph's type, or float16.
    zero_points: uint8 [N, ceil(blocks * bits / 8)], None where it is 2^(bits-1) everywhere; [N, blocks] of the graph's
    type where offsets are floats. row_scales: float16 [N] where scale and offset are a byte each; scales and
    zero_points are then the uint8 [N, blocks] of `calibrationless.Compact`. rows, cols: int32 [P], sorted; deltas:
    float32 [P], what is missing from the decoded weight at these places; None without outliers.
    channels: int32 [c], inputs that are kept out of the rounding of activations. accuracy_level: 0 multiplies in float,
    4 rounds activations to int8.
    """

    K: int
    N: int
    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    rows: Tensor | None = None
    cols: Tensor | None = None
    deltas: Tensor | None = None
    channels: Tensor | None = None
    accuracy_level: int = 0
    row_scales: Tensor | None = None
    trained: tuple[TrainedBlocks, ...] = ()

    @property
    def zero_kind(self) -> str:
        """What its zero points are: "" where there are none, "codes", "floats" or "bytes"."""
        if self.row_scales is not None:
            return "bytes"
        if self.zero_points is None:
            return ""
        return "floats" if self.zero_points.is_floating_point() else "codes"

    @property
    def has_offsets(self) -> bool:
        """Whether its zero points lie anywhere, not only on codes."""
        return self.zero_kind in ("floats", "bytes")

    @property
    def stock(self) -> bool:
        """Whether MatMulNBits can decode the codes."""
        return self.bits in STOCK_BITS and _SMALLEST <= self.block <= _LARGEST and self.block.bit_count() == 1

    @property
    def operator(self) -> str:
        """The node that it becomes."""
        coarse = self.accuracy_level == 4 and self.block > _ROUNDED
        plain = self.deltas is None and self.channels is None and not self.has_offsets
        return "MatMulNBits" if self.stock and plain and self.bits != 8 and not coarse else OPERATOR

    @property
    def outliers(self) -> int:
        return 0 if self.deltas is None else self.deltas.numel()

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, item.name) for item in fields(self))
        own = sum(part.numel() * part.itemsize for part in parts if isinstance(part, Tensor))
        return own + sum(part.nbytes for part in self.trained)

    @property
    def form(self) -> tuple[object, ...]:
        """What weights must have in common to be stacked."""
        channels = None if self.channels is None else tuple(self.channels.tolist())
        return (self.K, self.bits, self.block, self.zero_kind, channels)


def stock_block(inputs: int, block: int, bits: int) -> int | None:
    """The block of MatMulNBits that carries blocks of `block` weights in rows of `inputs`, None where there is none.

    A block is cut into the largest pieces that divide it. One block for the whole row is carried by any, since the last
    may hang over the end; the one that takes the fewest bytes with a four-byte scale is chosen.
    """
    if bits not in STOCK_BITS:
        return None
    if block < inputs:
        power = block & -block
        return None if power < _SMALLEST else min(power, _LARGEST)

    def row_bytes(size: int) -> int:
        return -(-inputs // size) * (size * bits // 8 + 4)

    return min((256, 128, 64, 32, 16), key=row_bytes)


def _packed_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, cols] -> uint8 [rows, ceil(cols * bits / 8)], each row padded to a byte."""
    used = -(-values.shape[1] * bits // 8)
    return pack(values.contiguous(), bits).view(torch.uint8)[:, :used].contiguous()


def pack_weight(
    quantized: QuantizedTensor, outliers: Points | None, dtype: torch.dtype, trained: Sequence[Blocks] = ()
) -> PackedWeight:
    """Pack a weight whose block is a group or a channel, with scales of `dtype`. trained: blocks that are added to it.

    Raises ValueError for another block, where a scale does not fit `dtype`, and for an outlier outside the weight.
    """
    count, inputs = quantized.shape
    match quantized.block:
        case Group(size):
            declared = size
        case Channel():
            declared = inputs
        case other:
            raise ValueError(f"block {other} is not a group or a channel")
    block = stock_block(inputs, declared, quantized.bits) or declared
    blocks = -(-inputs // block)

    def of_blocks(values: Tensor) -> Tensor:
        """[N, blocks] of the node, from those of the weight."""
        wide = values.expand(-1, blocks) if declared == inputs else values.repeat_interleave(declared // block, 1)
        return wide.contiguous()

    scales, zero_points, row_scales = _constants(quantized, dtype, of_blocks)
    codes = _packed_rows(torch.nn.functional.pad(quantized.codes, (0, blocks * block - inputs)), quantized.bits)
    added = tuple(trained_blocks(part, quantized.shape) for part in trained)
    packed = PackedWeight(
        inputs, count, quantized.bits, block, codes, scales, zero_points, row_scales=row_scales, trained=added
    )
    if outliers is None or not len(outliers):
        return packed
    check_patch(outliers, quantized.shape)
    # What the node decodes, not what the checkpoint's loader does, which rounds every product to the scale's dtype.
    scale = quantized.scale if quantized.compact is not None else quantized.scale.to(dtype).to(torch.float32)
    offset = None if quantized.offset is None else quantized.offset.to(torch.float32)
    decoded = dequantize(replace(quantized, scale=scale, offset=offset))
    rows, cols = outliers.rows.to(torch.int64), outliers.cols.to(torch.int64)
    deltas = outliers.values.to(torch.float32) - decoded[rows, cols]
    order = torch.argsort(rows * inputs + cols)
    return replace(
        packed,
        rows=outliers.rows[order].contiguous(),
        cols=outliers.cols[order].contiguous(),
        deltas=deltas[order].contiguous(),
    )


def _constants(
    quantized: QuantizedTensor, dtype: torch.dtype, of_blocks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales, zero points and row scales of a node."""
    if (compact := quantized.compact) is not None:
        return of_blocks(compact.exponents), of_blocks(compact.zeros), compact.rows
    scales = of_blocks(quantized.scale.to(dtype))
    if not torch.isfinite(scales).all():
        raise ValueError(f"a scale of {quantized.scale.abs().max():.3g} does not fit {dtype}")
    if quantized.offset is not None:
        zero_points = -quantized.offset.to(torch.float32) / quantized.scale.to(torch.float32)
        return scales, of_blocks(zero_points.to(dtype)), None
    if quantized.zero_point is None:
        return scales, None, None
    return scales, _packed_rows(of_blocks(quantized.zero_point), quantized.bits), None


def with_zero_points(weight: PackedWeight, kind: str) -> PackedWeight:
    """The weight with the zero points that it has anyhow, as "codes" or "floats"."""
    usual = torch.full(weight.scales.shape, 1 << (weight.bits - 1), dtype=torch.uint8)
    points = usual.to(weight.scales.dtype) if kind == "floats" else _packed_rows(usual, weight.bits)
    return replace(weight, zero_points=points)


def narrowed(weight: PackedWeight) -> PackedWeight:
    """The weight as its node holds it: LinearNBits takes scales in half beside any activations, and where half holds
    them all exactly (they come from a bfloat16 or float16 checkpoint), that is a tenth of a file of 4 bits saved."""
    if weight.row_scales is not None:
        return weight
    half = weight.scales.to(torch.float16)
    exact = weight.operator == OPERATOR and torch.equal(half.to(weight.scales.dtype), weight.scales)
    return replace(weight, scales=half) if exact else weight


def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
    """One weight whose outputs are those of `weights`, one after the other: fused q, k and v. Their `form` is one."""
    if len(weights) > 1 and len({weight.form for weight in weights}) != 1:
        raise ValueError("weights of different bits, blocks or channels cannot share a node")

    def joined(name: str, dim: int = 0) -> Tensor | None:
        parts = [part for weight in weights if (part := getattr(weight, name)) is not None]
        return torch.cat(parts, dim) if parts else None

    codes, scales = joined("codes"), joined("scales")
    assert codes is not None
    assert scales is not None
    starts = [sum(weight.N for weight in weights[:index]) for index in range(len(weights))]
    rows = [weight.rows + start for weight, start in zip(weights, starts, strict=True) if weight.rows is not None]
    return replace(
        weights[0],
        N=sum(weight.N for weight in weights),
        codes=codes,
        scales=scales,
        zero_points=joined("zero_points"),
        rows=torch.cat(rows) if rows else None,
        cols=joined("cols"),
        deltas=joined("deltas"),
        row_scales=joined("row_scales"),
        trained=join_blocks(
            [(start, part) for weight, start in zip(weights, starts, strict=True) for part in weight.trained]
        ),
    )


def take_rows(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """The weight of outputs start to stop - 1: one half of a fused gate and up."""
    part = replace(
        weight,
        N=stop - start,
        codes=weight.codes[start:stop],
        scales=weight.scales[start:stop],
        zero_points=None if weight.zero_points is None else weight.zero_points[start:stop],
        row_scales=None if weight.row_scales is None else weight.row_scales[start:stop],
        trained=tuple(part for whole in weight.trained if len(part := taken(whole, start, stop))),
    )
    if weight.rows is None or weight.cols is None or weight.deltas is None:
        return part
    inside = (weight.rows >= start) & (weight.rows < stop)
    if not bool(inside.any()):
        return replace(part, rows=None, cols=None, deltas=None)
    return replace(part, rows=weight.rows[inside] - start, cols=weight.cols[inside], deltas=weight.deltas[inside])
