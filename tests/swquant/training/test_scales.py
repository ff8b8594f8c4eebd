"""Scales that train, against autograd on the formula that they stand for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrationless import Blocks, Channel, Group, Points, dequantize, expand, quantize, quantize_affine, restore
from exporters import layouts
from swquant.training.patched_linear import PatchedLinear
from swquant.training.scales import ScaledWeight

SHAPE = (12, 64)


def rounded(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    weight = torch.randn(SHAPE)
    match kind:
        case "offset":
            return weight, quantize_affine(weight, Group(32), 4, storage=dtype)
        case "channel":
            return weight, quantize(weight, Channel(), 8, scale_dtype=dtype)
    return weight, quantize(weight, Group(32), 4, symmetric=kind == "symmetric", scale_dtype=dtype)


def scaled(kind: str, dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> tuple[ScaledWeight, Any, Any]:
    weight, quantized = rounded(kind, dtype)
    points = Points.at(weight, torch.tensor([3, 7]), torch.tensor([1, 60]))
    return ScaledWeight(quantized, (points,), transposed), quantized, points


def decoded(layer: ScaledWeight, stored: Any, points: Points) -> Tensor:
    """The formula, for autograd."""
    steps, scale = layer.steps.detach().clone().requires_grad_(), stored.scale.float()
    codes = stored.codes.float()
    spread = lambda values: expand(values, stored.block, stored.shape)  # noqa: E731
    leaves = [steps]
    if stored.offset is not None:
        assert layer.shifts is not None
        shifts = layer.shifts.detach().clone().requires_grad_()
        leaves.append(shifts)
        offset = stored.offset.float() + scale.abs() * 2 ** (stored.bits - 1) * shifts
        weight = codes * spread(scale * steps.exp()) + spread(offset)
    else:
        zero = 2 ** (stored.bits - 1) if stored.zero_point is None else spread(stored.zero_point).float()
        weight = (codes - zero) * spread(scale * steps.exp())
    mask = torch.ones(SHAPE)
    mask[points.rows.long(), points.cols.long()] = 0
    held = restore(torch.zeros(SHAPE), points)
    return weight * mask + held, leaves  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "offset", "channel"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_formula(kind: str, transposed: bool) -> None:
    layer, stored, points = scaled(kind, transposed=transposed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.05)
    weight, leaves = decoded(layer, stored, points)
    size, out = SHAPE if transposed else SHAPE[::-1]
    linear = PatchedLinear(layer, torch.randn(out), None, transposed=transposed)
    x = torch.randn(2, 5, size, requires_grad=True)
    expected = nn.functional.linear(x, weight.T if transposed else weight, linear.bias)
    coefficients = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * coefficients).sum(), (x, *leaves))
    y = linear(x)
    assert torch.allclose(y, expected, atol=1e-4)
    found = torch.autograd.grad((y * coefficients).sum(), (x, *layer.parameters()))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["symmetric", "offset"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_trained_is_what_is_stored(kind: str, dtype: torch.dtype) -> None:
    """Forward sees scales of 16 bits, as they will be written; zeros are what was there."""
    layer, stored, points = scaled(kind, dtype)
    assert torch.equal(layer.trained.scale, stored.scale)
    assert torch.equal(layer.decoded(torch.zeros(())), restore(dequantize(stored), points).float())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
    now = layer.trained
    assert now.scale.dtype is dtype
    assert torch.equal(now.codes, stored.codes)
    assert not torch.equal(now.scale, stored.scale)
    written = layouts.from_tensors(layouts.to_tensors(now), 4, SHAPE)
    assert torch.equal(layer.decoded(torch.zeros(())), restore(dequantize(written), points).float())


def test_blocks_lie_over_scales_that_train() -> None:
    layer, stored, points = scaled("symmetric")
    blocks = Blocks(torch.tensor([0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32), torch.randn(1, 8, 8))
    linear = PatchedLinear(layer, None, blocks)
    assert sorted(name for name, _ in linear.named_parameters()) == ["frozen.steps", "values"]
    weight, (steps,) = decoded(layer, stored, points)
    whole = weight.clone()
    values = blocks.values[0].clone().requires_grad_()
    whole[:8, 24:32] = whole[:8, 24:32] + values
    x = torch.randn(6, 64)
    wanted = torch.autograd.grad((x @ whole.T).square().sum(), (steps, values))
    found = torch.autograd.grad(linear(x).square().sum(), (layer.steps, linear.values))
    assert torch.allclose(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    assert torch.allclose(found[1][0], wanted[1], rtol=1e-3, atol=1e-3)


def test_under_autocast_gradients_are_float32() -> None:
    layer, _, _ = scaled("symmetric", torch.bfloat16)
    linear = PatchedLinear(layer, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(torch.randn(7, 64, requires_grad=True))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert layer.steps.grad is not None
    assert layer.steps.grad.dtype is torch.float32
