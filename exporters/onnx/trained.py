"""Trained blocks in an ONNX graph: what `tune` adds to a weight, beside the node that holds its codes.

    Y[:, R] += X[:, C] V^T    for every block

The codes stay what they are; standard operators, which every runtime has, multiply with the blocks: the columns that
they read are gathered, one product takes all of them, its results are added to their rows. What sticks out of the
weight reads column 0 and adds to row 0, times a value that is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir
import torch
from torch import Tensor

from calibrationless import Blocks, check_patch

__all__ = ["TrainedBlocks", "joined", "product_nodes", "taken", "trained_blocks"]


@dataclass(frozen=True)
class TrainedBlocks:
    """rows, cols: int64 [n, B], outputs and inputs of every block. values: float32 [n, B, B], [output, input]."""

    rows: Tensor
    cols: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.cols.nbytes + self.values.nbytes


def trained_blocks(blocks: Blocks, shape: tuple[int, int]) -> TrainedBlocks:
    """Those of a [N, K] weight. Raises ValueError for blocks that replace what they lie on, or do not fit."""
    check_patch(blocks, shape)
    if blocks.mode != "add":
        raise ValueError(f"blocks that {blocks.mode} a weight have no node; those that add to it do")
    inner = torch.arange(blocks.side)
    rows, cols = (index.to(torch.int64).unsqueeze(1) * blocks.side + inner for index in (blocks.rows, blocks.cols))
    values = blocks.values.to(torch.float32)
    values = values * (rows < shape[0]).unsqueeze(2) * (cols < shape[1]).unsqueeze(1)
    return TrainedBlocks(rows.where(rows < shape[0], 0), cols.where(cols < shape[1], 0), values)


def joined(parts: Sequence[tuple[int, TrainedBlocks]]) -> tuple[TrainedBlocks, ...]:
    """Those of weights that are stacked, in one product for all of the same side. parts: (the weight's first output,
    its blocks)."""
    sides: dict[int, list[TrainedBlocks]] = {}
    for start, part in parts:
        sides.setdefault(part.values.shape[2], []).append(replace(part, rows=part.rows + start))
    return tuple(
        TrainedBlocks(*(torch.cat([getattr(part, name) for part in same]) for name in ("rows", "cols", "values")))
        for same in sides.values()
    )


def taken(part: TrainedBlocks, start: int, stop: int) -> TrainedBlocks:
    """What is left of them where only the outputs start to stop - 1 are: see `nodes.take_rows`."""
    inside = (part.rows >= start) & (part.rows < stop)
    kept = (inside & part.values.any(dim=2)).any(dim=1)  # rows outside the weight have zeros
    values = part.values[kept] * inside[kept].unsqueeze(2)
    return TrainedBlocks((part.rows[kept] - start).where(inside[kept], 0), part.cols[kept], values)


def product_nodes(
    x: onnx_ir.Value,
    y: onnx_ir.Value,
    name: str,
    part: TrainedBlocks,
    constant: Callable[[str, Tensor], onnx_ir.Value],
) -> list[onnx_ir.Node]:
    """Nodes of which the last one gives y [batch, tokens, N] with the products of x [batch, tokens, K] added. constant:
    (name, tensor) -> an initializer of the graph."""
    count, side = part.rows.shape
    nodes: list[onnx_ir.Node] = []

    def add(operator: str, *inputs: onnx_ir.Value, **attributes: object) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(operator, inputs, attributes))  # type: ignore[arg-type]
        return nodes[-1].outputs[0]

    def of_form(value: onnx_ir.Value, key: str, *sizes: int) -> onnx_ir.Value:
        return add("Reshape", value, constant(f"{name}.{key}", torch.tensor(sizes)))

    gathered = add("Gather", x, constant(f"{name}.cols", part.cols.flatten()), axis=-1)
    read = add("Transpose", of_form(gathered, "in_blocks", 0, 0, count, side), perm=[0, 2, 1, 3])
    values = add("CastLike", constant(f"{name}.values", part.values.mT.contiguous()), x)
    product = add("Transpose", add("MatMul", read, values), perm=[0, 2, 1, 3])
    # In float32, because the runtime cannot add with ScatterElements in half precision on a CPU.
    added = add("Cast", of_form(product, "in_rows", 0, 0, count * side), to=onnx_ir.DataType.FLOAT.value)
    places = add("Expand", constant(f"{name}.rows", part.rows.flatten()), add("Shape", added))
    whole = add("Cast", y, to=onnx_ir.DataType.FLOAT.value)
    add("CastLike", add("ScatterElements", whole, places, added, axis=-1, reduction="add"), y)
    return nodes
