"""Nodes of trained blocks, run by ONNX's reference, against the dense sum."""

import numpy as np
import onnx_ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from calibrationless import Blocks, restore
from exporters.onnx.trained import TrainedBlocks, joined, product_nodes, taken, trained_blocks


def some(shape: tuple[int, int], side: int, places: list[tuple[int, int]], mode: str = "add") -> Blocks:
    rows, cols = torch.tensor(places, dtype=torch.int32).T
    values = torch.randn(len(places), side, side, generator=torch.Generator().manual_seed(len(places)))
    inside_rows = (rows.view(-1, 1, 1) * side + torch.arange(side).view(-1, 1)) < shape[0]
    inside_cols = (cols.view(-1, 1, 1) * side + torch.arange(side)) < shape[1]
    return Blocks(rows.contiguous(), cols.contiguous(), values * inside_rows * inside_cols, mode)


def run(part: TrainedBlocks, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the nodes make of x [batch, tokens, K] and y [batch, tokens, N]."""
    kind = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(x.numpy().dtype))
    a, b = (onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(item.shape)) for name, item in (("a", x), ("b", y)))
    initializers: list[onnx_ir.Value] = []

    def constant(name: str, tensor: torch.Tensor) -> onnx_ir.Value:
        content = onnx_ir.tensor(tensor.numpy(), name=name)
        initializers.append(
            onnx_ir.Value(name=name, const_value=content, type=onnx_ir.TensorType(content.dtype), shape=content.shape)
        )
        return initializers[-1]

    nodes = product_nodes(a, b, "w", part, constant)
    result = nodes[-1].outputs[0]
    result.name, result.type = "result", kind
    graph = onnx_ir.Graph([a, b], [result], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    model = onnx_ir.serde.serialize_model(onnx_ir.Model(graph, ir_version=10))
    (found,) = ReferenceEvaluator(model).run(None, {"a": x.numpy(), "b": y.numpy()})
    return torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize(("shape", "side"), [((32, 48), 16), ((20, 30), 16), ((5, 6), 8)])
def test_it_adds_the_product_of_the_blocks(shape: tuple[int, int], side: int) -> None:
    """Two blocks of one row, two that read the same columns, and some that stick out."""
    grid = [(row, col) for row in range(-(-shape[0] // side)) for col in range(-(-shape[1] // side))]
    blocks = some(shape, side, grid)
    x, y = torch.randn(2, 3, shape[1]), torch.randn(2, 3, shape[0])
    expected = y + x @ restore(torch.zeros(shape), blocks).T
    assert torch.allclose(run(trained_blocks(blocks, shape), x, y), expected, atol=1e-4)


def test_in_half_it_stays_in_half() -> None:
    blocks = some((16, 16), 8, [(0, 1), (0, 0)])
    x, y = torch.randn(1, 3, 16).half(), torch.randn(1, 3, 16).half()
    found = run(trained_blocks(blocks, (16, 16)), x, y)
    assert found.dtype is torch.float16
    expected = y.float() + x.float() @ restore(torch.zeros(16, 16), blocks).T
    assert torch.allclose(found.float(), expected, atol=0.05)


def test_stacked_weights_share_a_product_where_sides_agree() -> None:
    first, second, other = some((20, 16), 8, [(2, 0), (0, 1)]), some((16, 16), 8, [(1, 1)]), some((16, 16), 4, [(3, 3)])
    parts = joined(
        [
            (0, trained_blocks(first, (20, 16))),
            (20, trained_blocks(second, (16, 16))),
            (20, trained_blocks(other, (16, 16))),
        ]
    )
    assert [len(part) for part in parts] == [3, 1]
    whole = torch.cat([restore(torch.zeros(20, 16), first), restore(torch.zeros(16, 16), second, other)])
    x, y = torch.randn(1, 2, 16), torch.zeros(1, 2, 36)
    for part in parts:
        y = run(part, x, y)
    assert torch.allclose(y, x @ whole.T, atol=1e-4)


def test_of_some_rows_only_their_part_is_left() -> None:
    """A fused gate and up is cut in two, wherever blocks lie."""
    blocks = some((20, 16), 8, [(0, 0), (1, 1), (2, 0)])
    whole = restore(torch.zeros(20, 16), blocks)
    part = trained_blocks(blocks, (20, 16))
    x = torch.randn(1, 2, 16)
    for start, stop, count in ((0, 10, 2), (10, 20, 2), (0, 8, 1)):
        cut = taken(part, start, stop)
        assert len(cut) == count
        assert torch.allclose(run(cut, x, torch.zeros(1, 2, stop - start)), x @ whole[start:stop].T, atol=1e-4)


def test_blocks_that_replace_have_no_node() -> None:
    with pytest.raises(ValueError, match="replace a weight have no node"):
        trained_blocks(some((16, 16), 8, [(0, 0)], "replace"), (16, 16))
    with pytest.raises(ValueError, match="outside its shape"):
        trained_blocks(some((16, 16), 8, [(5, 0)]), (16, 16))
