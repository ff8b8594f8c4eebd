"""How a weight becomes a node: blocks that MatMulNBits takes, the bytes, and what is left to outliers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibrationless import Points, dequantize, parse_block, parts_of, quantize, restore
from exporters.onnx.nodes import PackedWeight, pack_weight, stock_block


@pytest.mark.parametrize(
    ("inputs", "block", "bits", "expected"),
    [
        (4096, 128, 4, 128),
        (4096, 1024, 4, 256),  # cut into the largest that older runtimes take
        (4096, 512, 8, 256),
        (576, 48, 4, 16),  # 48 is three times 16
        (576, 24, 4, None),
        (1536, 8, 4, None),
        (1536, 1536, 4, 256),  # one scale for a row
        (576, 576, 4, 64),  # 256 would hang over by 192 weights, more bytes than the scales save
        (100, 100, 4, 128),  # hangs over by 28 weights, 14 bytes; blocks of 32 would by as many, with three scales more
        (4096, 128, 3, None),
        (4096, 4096, 5, None),
    ],
)
def test_the_block_that_the_stock_operator_takes(inputs: int, block: int, bits: int, expected: int | None) -> None:
    assert stock_block(inputs, block, bits) == expected


def decode(weight: PackedWeight) -> torch.Tensor:
    """[N, K] from the bytes, bit by bit: what the contract of the operator says, and nothing clever."""

    def numbers(stream: torch.Tensor, count: int) -> torch.Tensor:
        bits = (stream.unsqueeze(-1) >> torch.arange(8)) & 1
        bits = bits.flatten(1)[:, : count * weight.bits].reshape(len(stream), count, weight.bits)
        return (bits * (1 << torch.arange(weight.bits))).sum(-1)

    blocks = weight.scales.shape[1]
    codes = numbers(weight.codes, blocks * weight.block)
    zero_points = torch.full((weight.N, blocks), 1 << (weight.bits - 1))
    if weight.zero_points is not None:
        zero_points = numbers(weight.zero_points, blocks)
    values = (codes - zero_points.repeat_interleave(weight.block, 1)) * weight.scales.repeat_interleave(weight.block, 1)
    values = values[:, : weight.K].to(torch.float32)
    if weight.deltas is not None:
        assert weight.rows is not None
        assert weight.cols is not None
        values[weight.rows.long(), weight.cols.long()] += weight.deltas
    return values


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("block", ["32", "48", "24", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bytes_say_what_the_checkpoint_says(bits: int, block: str, symmetric: bool) -> None:
    weight = torch.randn(13, 96, generator=torch.Generator().manual_seed(bits))
    quantized = quantize(weight, parse_block(block), bits, symmetric=symmetric)
    packed = pack_weight(quantized, None, torch.float32)
    assert torch.equal(decode(packed), dequantize(quantized))
    stock = bits in (2, 4) and block != "24"
    assert packed.operator == ("MatMulNBits" if stock else "LinearNBits")
    fine = packed.block <= 32
    assert replace(packed, accuracy_level=4).operator == ("MatMulNBits" if stock and fine else "LinearNBits")


def test_outliers_are_what_the_node_is_missing() -> None:
    """The checkpoint's loader rounds each product to bfloat16, the node does not: deltas are those of the node."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, parse_block("32"), 4, scale_dtype=torch.bfloat16)
    points = Points.at(weight, torch.tensor([1, 7, 1]), torch.tensor([63, 0, 2]))
    unsorted = Points(*(part.flip(0) for part in parts_of(points).values()))
    packed = pack_weight(quantized, unsorted, torch.float32)
    assert packed.operator == "LinearNBits"
    assert packed.outliers == 3
    assert packed.rows is not None
    assert packed.cols is not None
    assert list(zip(packed.rows.tolist(), packed.cols.tolist(), strict=True)) == [(1, 2), (1, 63), (7, 0)]
    exact = decode(pack_weight(quantized, None, torch.float32))
    assert torch.allclose(decode(packed), restore(exact, unsorted), atol=1e-7)


def test_what_cannot_be_packed_is_refused() -> None:
    weight = torch.randn(8, 64)
    with pytest.raises(ValueError, match="block 4x32 is not a group or a channel"):
        pack_weight(quantize(weight, parse_block("4x32"), 4), None, torch.float32)
    with pytest.raises(ValueError, match="does not fit torch.float16"):
        pack_weight(quantize(weight * 1e6, parse_block("32"), 4), None, torch.float16)
    outside = Points(torch.tensor([8], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), torch.ones(1))
    with pytest.raises(ValueError, match=r"row is outside 0 \.\. 7"):
        pack_weight(quantize(weight, parse_block("32"), 4), outside, torch.float32)
