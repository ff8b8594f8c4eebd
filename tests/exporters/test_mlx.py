"""MLX's layout against plain arithmetic: what is stored stands for the same weights, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calibrationless import Channel, Group, QuantizedTensor, dequantize
from exporters import mlx
from exporters.packing import unpack


def quantized(bits: int, group: int, *, offset: bool = False, zero_point: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits * group)
    codes = torch.randint(0, 1 << bits, (5, 384), generator=generator).to(torch.uint8)
    scale = torch.randn(5, 384 // group, generator=generator).to(torch.bfloat16)
    points = torch.randint(0, 1 << bits, scale.shape, generator=generator).to(torch.uint8)
    block = Channel() if group == 384 else Group(group)
    offsets = torch.randn(scale.shape, generator=generator).to(torch.bfloat16) if offset else None
    return QuantizedTensor(codes, scale, points if zero_point else None, block, bits, offset=offsets)


def decoded(parts: dict[str, Tensor], bits: int) -> Tensor:
    """By the formula, in float32."""
    codes = unpack(parts["weight"].view(torch.int32), bits, 384).float()
    group = 384 // parts["scales"].shape[1]
    scales, biases = (parts[name].float().repeat_interleave(group, dim=1) for name in ("scales", "biases"))
    return scales * codes + biases


@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize("group", mlx.GROUPS)
@pytest.mark.parametrize("bits", mlx.BITS)
def test_parts_stand_for_the_same_weights(bits: int, group: int, offset: bool) -> None:
    weight = quantized(bits, group, offset=offset)
    parts = mlx.to_tensors(weight)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == mlx.tensor_layout(
        (5, 384), group, bits, torch.bfloat16
    )
    offsets = None if weight.offset is None else weight.offset.float()
    exact = dequantize(replace(weight, scale=weight.scale.float(), offset=offsets))
    assert torch.allclose(decoded(parts, bits), exact, rtol=0, atol=1e-5)  # the order of a product and a sum


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (quantized(7, 64), "7 bits; it knows 2, 3, 4, 5, 6, 8"),
        (quantized(4, 16), "16 inputs to a scale; it knows groups of 32, 64, 128"),
        (quantized(4, 384), "384 inputs to a scale"),
        (quantized(4, 64, zero_point=True), "zero points, whose products with scales would be rounded again"),
    ],
    ids=["bits", "group", "channel", "zero points"],
)
def test_what_it_cannot_hold_is_refused(weight: QuantizedTensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^MLX cannot hold {message}"):
        mlx.to_tensors(weight)


def test_the_commonest_scheme_stands_for_all() -> None:
    assert mlx.quantization_config({"a": (4, 64), "b": (8, 32), "c": (4, 64)}) == {
        "group_size": 64,
        "bits": 4,
        "b": {"group_size": 32, "bits": 8},
    }
