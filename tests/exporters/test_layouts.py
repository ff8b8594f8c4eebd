"""Layouts: what was planned is what is written, what is written is read back, and what is damaged is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrationless import Channel, Group, Recipe, Tile, dequantize, follow, quantize, quantize_affine
from exporters import compact_layout, layouts

KINDS = ("none", "float", "byte")


@given(
    offsets=st.sampled_from(KINDS),
    bits=st.sampled_from((2, 4, 8)),
    size=st.sampled_from((32, 64, 128)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_weight_comes_back(offsets: str, bits: int, size: int, rows: int, groups: int, seed: int) -> None:
    weight = torch.randn(rows, size * groups, generator=torch.Generator().manual_seed(seed))
    recipe = Recipe(Group(size), bits, offsets=offsets, scale_dtype=torch.float16)
    quantized = follow(recipe, weight).quantized
    tensors = layouts.to_tensors(quantized)
    planned = layouts.tensor_layout(recipe, (rows, size * groups))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == planned
    layouts.check_tensors(tensors, bits, weight.shape)
    read = layouts.from_tensors(tensors, bits, weight.shape)
    assert torch.equal(dequantize(read), dequantize(quantized))
    dtype = layouts.decoded_dtype({name: tensor.dtype for name, tensor in tensors.items()})
    assert dtype is dequantize(read).dtype


@given(
    bits=st.integers(2, 8),
    size=st.integers(1, 50),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    whole=st.booleans(),
)
def test_bytes_of_any_group_or_channel_come_back(bits: int, size: int, rows: int, groups: int, whole: bool) -> None:
    weight = torch.randn(rows, size * groups, generator=torch.Generator().manual_seed(bits))
    quantized = quantize_affine(weight, Channel() if whole else Group(size), bits, storage=None)
    read = layouts.from_tensors(layouts.to_tensors(quantized), bits, weight.shape)
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(dequantize(read), dequantize(quantized))


def test_a_row_of_zeros_and_blocks_that_do_not_reach_zero_come_back() -> None:
    weight = torch.randn(5, 64) * 0.02
    weight[0], weight[1, :32], weight[2, 32:] = 0.0, 0.5, -0.25
    quantized = quantize_affine(weight, Group(32), 4, storage=None)
    read = dequantize(layouts.from_tensors(layouts.to_tensors(quantized), 4, weight.shape))
    assert torch.equal(read, dequantize(quantized))
    assert torch.equal(read[0], torch.zeros(64))
    assert (read[1, :32] - 0.5).abs().max() < 0.005
    assert (read[2, 32:] + 0.25).abs().max() < 0.005


def spoilt(change: str) -> dict[str, torch.Tensor]:
    tensors = layouts.to_tensors(quantize_affine(torch.randn(4, 64), Group(32), 4, storage=None))
    match change:
        case "a part is missing":
            del tensors["zeros"]
        case "groups do not divide":
            tensors["exponents"] = tensors["exponents"].repeat(1, 3)[:, :5]
        case "exponents of one dimension":
            tensors["exponents"] = tensors["exponents"].flatten()
        case "zeros of another shape":
            tensors["zeros"] = tensors["zeros"][:, :1]
        case "codes of other bits":
            tensors["codes"] = tensors["codes"][:, :6]
        case "row scales in float32":
            tensors["row_scales"] = tensors["row_scales"].float()
        case "an infinite row scale":
            tensors["row_scales"][2] = torch.inf
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a part is missing", "are not the parts of one weight"),
        ("groups do not divide", "5 scales per row do not divide 64 inputs"),
        ("exponents of one dimension", "0 scales per row"),
        ("zeros of another shape", r"zeros \[4, 1\] of torch.uint8 is not \[4, 2\]"),
        ("codes of other bits", r"codes \[4, 6\]"),
        ("row scales in float32", "row_scales .* of torch.float32"),
        ("an infinite row scale", "row_scales holds a NaN or infinite value"),
    ],
)
def test_damage_is_named(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact_layout.check_tensors(spoilt(change), 4, (4, 64))


def test_what_a_layout_cannot_hold() -> None:
    with pytest.raises(ValueError, match="no bytes"):
        compact_layout.to_tensors(quantize(torch.randn(4, 64), Group(32), 4))
    with pytest.raises(ValueError, match="no group within a row"):
        compact_layout.tensor_layout((4, 64), Tile(2, 32), 4)
    assert layouts.decoded_dtype({"weight_packed": torch.int32}) is None
