"""The layer that trains blocks, against autograd on a dense weight."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrationless import Blocks, Group, Points, quantize, restore
from exporters import layouts
from swquant.training.patched_linear import DenseWeight, PackedWeight, PatchedLinear

# [out, in] and the side of a block: dividing, sticking out at either edge or both, one block larger than the weight.
SHAPES = [(8, 12, 4), (9, 12, 4), (8, 13, 4), (10, 7, 3), (5, 6, 8), (64, 192, 64), (1, 9, 2)]


def some_blocks(shape: tuple[int, int], side: int, dtype: torch.dtype, seed: int = 0) -> Blocks:
    """A third of all blocks, the last among them, zero where they stick out."""
    grid = [*itertools.product(range(-(-shape[0] // side)), range(-(-shape[1] // side)))]
    generator = torch.Generator().manual_seed(seed)
    chosen = sorted({len(grid) - 1, *torch.randperm(len(grid), generator=generator)[: len(grid) // 3].tolist()})
    rows, cols = (torch.tensor(part, dtype=torch.int32) for part in zip(*(grid[i] for i in chosen), strict=True))
    values = torch.randn(len(chosen), side, side, generator=generator, dtype=dtype)
    return Blocks(rows, cols, values * inside(shape, rows, cols, side))


def inside(shape: tuple[int, int], rows: Tensor, cols: Tensor, side: int) -> Tensor:
    inner = torch.arange(side)
    return (rows.view(-1, 1, 1) * side + inner.view(-1, 1) < shape[0]) & (cols.view(-1, 1, 1) * side + inner < shape[1])


def made(
    shape: tuple[int, int], side: int, dtype: torch.dtype, *, bias: bool = True
) -> tuple[PatchedLinear, Tensor, Any]:
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=dtype)
    blocks = some_blocks(shape, side, dtype)
    layer = PatchedLinear(DenseWeight(weight), torch.randn(shape[0], dtype=dtype) if bias else None, blocks)
    return layer, weight, blocks


@pytest.mark.parametrize(("out", "size", "side"), SHAPES)
def test_it_computes_what_a_dense_layer_computes_and_so_are_its_gradients(out: int, size: int, side: int) -> None:
    layer, weight, blocks = made((out, size), side, torch.float64)
    x = torch.randn(2, 5, size, dtype=torch.float64, requires_grad=True)
    whole = weight.clone()
    for row, col, values in zip(blocks.rows, blocks.cols, blocks.values, strict=True):
        r, c = int(row) * side, int(col) * side
        part = whole[r : r + side, c : c + side]
        part += values[: part.shape[0], : part.shape[1]]
    dense = whole.requires_grad_()
    expected = nn.functional.linear(x, dense, layer.bias)
    coefficients = torch.randn_like(expected)
    of_x, of_weight = torch.autograd.grad((expected * coefficients).sum(), (x, dense))
    y = layer(x)
    assert torch.allclose(y, expected)
    mine_of_x, of_values = torch.autograd.grad((y * coefficients).sum(), (x, layer.values))
    assert torch.allclose(mine_of_x, of_x)
    for row, col, gradient in zip(blocks.rows, blocks.cols, of_values, strict=True):
        r, c = int(row) * side, int(col) * side
        part = of_weight[r : r + side, c : c + side]
        assert torch.allclose(gradient[: part.shape[0], : part.shape[1]], part)
    assert bool((of_values * ~inside((out, size), blocks.rows, blocks.cols, side) == 0).all())
    assert torch.allclose(layer.weight, dense.float(), atol=1e-5)


@pytest.mark.parametrize(("out", "size", "side"), [(6, 8, 4), (5, 7, 3)])
def test_its_gradients_are_those_of_its_values(out: int, size: int, side: int) -> None:
    layer, _, _ = made((out, size), side, torch.float64)
    x = torch.randn(3, size, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.values.detach().clone().requires_grad_()))


def test_nothing_but_the_blocks_is_kept_and_gets_a_gradient() -> None:
    layer, weight, _ = made((64, 192), 64, torch.float32)
    assert [name for name, _ in layer.named_parameters()] == ["values"]
    saved: list[Tensor] = []
    x = torch.randn(7, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    used = len(set(layer.cols.tolist()))
    floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.data_ptr() != layer.values.data_ptr()]
    assert sum(tensor.numel() for tensor in floats) == used * 7 * 64
    y.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_weight_gives_the_numbers_of_its_loader(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    quantized = quantize(weight, Group(32), 4, symmetric=symmetric, scale_dtype=torch.bfloat16)
    points = Points.at(weight.bfloat16(), torch.tensor([3, 7]), torch.tensor([1, 60]))
    packed = PackedWeight(layouts.to_tensors(quantized), 4, (24, 64), (points,))
    assert packed.nbytes < 0.2 * weight.nbytes
    dense = packed.decoded(torch.zeros(()))
    assert float((dense - weight).abs().max()) < 1
    assert torch.equal(dense[3, 1], weight[3, 1].bfloat16().float())
    blocks = some_blocks((24, 64), 16, torch.float32)
    a, b = PatchedLinear(packed, None, blocks), PatchedLinear(DenseWeight(dense), None, blocks)
    x = torch.randn(5, 64, requires_grad=True)
    results = [(layer(x), *torch.autograd.grad(layer(x).square().sum(), (x, layer.values))) for layer in (a, b)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_blocks_of_a_transposed_weight_come_back_as_they_are_stored() -> None:
    torch.manual_seed(0)
    stored, bias = torch.randn(10, 7), torch.randn(7)  # [in, out], as GPT-2 has it
    blocks = some_blocks((10, 7), 3, torch.float32)
    layer = PatchedLinear(DenseWeight(stored.T), bias, blocks, transposed=True)
    x = torch.randn(4, 10)
    assert torch.allclose(layer(x), x @ restore(stored.clone(), blocks) + bias, atol=1e-5)
    back = layer.trained(torch.float32)
    assert torch.equal(back.rows, blocks.rows)
    assert torch.equal(back.cols, blocks.cols)
    assert torch.equal(back.values, blocks.values)


def test_under_autocast_it_computes_in_its_dtype() -> None:
    layer, _, _ = made((64, 192), 64, torch.float32)
    x = torch.randn(7, 192)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype is torch.float32
    assert torch.allclose(y.float(), layer(x), atol=0.5)


def test_blocks_that_replace_are_refused() -> None:
    blocks = some_blocks((8, 8), 4, torch.float32)
    with pytest.raises(ValueError, match="replace a weight cannot be trained"):
        PatchedLinear(DenseWeight(torch.zeros(8, 8)), None, Blocks(blocks.rows, blocks.cols, blocks.values, "replace"))
