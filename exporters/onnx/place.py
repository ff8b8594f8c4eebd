"""Put quantized linears into a graph: a MatMul, or a placeholder for one, becomes the nodes of its packed weight.

plain                             MatMulNBits
all others (see `nodes`)          LinearNBits, with a function for runtimes without our library
trained blocks                    standard operators behind either (see `trained`)
embedding tied to the head        Gather of its rows of codes and scales, decoded by standard operators
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from calibrationless import compact_steps
from exporters.onnx.function import Form, linear_function
from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR, PackedWeight, narrowed, with_zero_points
from exporters.onnx.trained import product_nodes

__all__ = ["Placer", "common_form"]


def common_form(weights: Mapping[str, PackedWeight]) -> tuple[dict[str, PackedWeight], Form | None]:
    """(the weights, the form of the file's LinearNBits nodes or None where there are none).

    One function gives all of them their meaning, so where one has outliers or channels, all get some that change
    nothing: an outlier of zero, a channel that is multiplied apart.
    """
    ours = {name: weight for name, weight in weights.items() if weight.operator == OPERATOR}
    if not ours:
        return dict(weights), None
    narrow = {name: narrowed(weight) for name, weight in ours.items()}
    form = Form(
        stock=all(weight.stock for weight in ours.values()),
        zero_points=_zero_kind(ours),
        outliers=any(weight.outliers for weight in ours.values()),
        channels=any(weight.channels is not None for weight in ours.values()),
        ragged=any(weight.K % weight.block for weight in ours.values()),
        widened=any(narrow[name].scales.dtype != weight.scales.dtype for name, weight in ours.items()),
    )
    first, nothing = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for name, weight in narrow.items():
        if form.outliers and not weight.outliers:
            weight = replace(weight, rows=first, cols=first, deltas=nothing)
        if form.channels and weight.channels is None:
            weight = replace(weight, channels=first)
        # MatMulNBits knows the usual zero point; where the function decodes codes itself, it takes what it is given.
        given = form.zero_points == "floats" or form.channels or not form.stock
        if form.zero_points and weight.zero_points is None and given:
            weight = with_zero_points(weight, form.zero_points)
        ours[name] = weight
    return {**weights, **ours}, form


def _zero_kind(weights: Mapping[str, PackedWeight]) -> str:
    """The one kind of zero points that all nodes of a file can have."""
    kinds = {weight.zero_kind for weight in weights.values()}
    if len(kinds - {""}) > 1 or {"", "bytes"} <= kinds:
        raise ValueError(f"zero points of a file cannot be {' and '.join(sorted(kind or 'none' for kind in kinds))}")
    return max(kinds)


def _one_each(weight: PackedWeight) -> Tensor:
    """The zero points of a table, [N, blocks], one number each: packed ones are uint8 [N, blocks * bits / 8]."""
    assert weight.zero_points is not None
    if weight.zero_kind == "floats" or weight.bits == 8:
        return weight.zero_points
    halves = torch.stack((weight.zero_points & 15, weight.zero_points >> 4), -1)
    return halves.flatten(1)[:, : weight.scales.shape[1]].contiguous()


class Placer:
    """Replaces nodes of one graph."""

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model
        self._shared: dict[tuple[int, tuple[int, ...]], onnx_ir.Value] = {}
        model.opset_imports[MICROSOFT] = 1

    def add_function(self, form: Form) -> None:
        """Put the meaning of swquant::LinearNBits into the file."""
        function = onnx_ir.serde.deserialize_function(linear_function(form))
        self._model.functions[function.identifier()] = function
        self._model.opset_imports[DOMAIN] = 1

    def _constant(self, name: str, tensor: Tensor | np.ndarray) -> onnx_ir.Value:
        """An initializer; the one of this name where there is one already."""
        if (known := self._model.graph.initializers.get(name)) is not None:
            return known
        array = tensor.numpy() if isinstance(tensor, Tensor) else tensor
        content = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
        value = onnx_ir.Value(
            name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(content.dtype), const_value=content
        )
        self._model.graph.initializers[name] = value
        return value

    def _channels(self, name: str, weight: PackedWeight, x: onnx_ir.Value) -> onnx_ir.Value | None:
        """The same constant for all linears that share x and its channels, so that a runtime that inlines the function
        sees that they mask the same x in the same way, and does so once."""
        if weight.channels is None:
            return None
        key = (id(x), tuple(weight.channels.tolist()))
        if key not in self._shared:
            self._shared[key] = self._constant(f"{name}.channels", weight.channels)
        return self._shared[key]

    def replace(self, node: onnx_ir.Node, name: str, weight: PackedWeight) -> None:
        """`node`, whose first input is multiplied with the weight `name`, becomes the nodes of `weight`."""
        x = node.inputs[0]
        assert x is not None
        nodes: list[onnx_ir.Node] = []
        attributes = {"K": weight.K, "N": weight.N, "bits": weight.bits, "accuracy_level": weight.accuracy_level}
        scales = self._constant(f"{name}.scales", weight.scales)
        points = None if weight.zero_points is None else self._constant(f"{name}.zero_points", weight.zero_points)
        if weight.operator == OPERATOR:
            codes = self._blocks(name, weight)
            outliers = [
                None if (part := getattr(weight, key)) is None else self._constant(f"{name}.{key}", part)
                for key in ("rows", "cols", "deltas")
            ]
            rows = None if weight.row_scales is None else self._constant(f"{name}.row_scales", weight.row_scales)
            inputs = [x, codes, scales, points, *outliers, self._channels(name, weight, x), None, rows]
            while inputs[-1] is None:
                inputs.pop()
            attributes |= {"block_rows": 1, "block_cols": weight.block}
            nodes.append(onnx_ir.node(OPERATOR, inputs, attributes, domain=DOMAIN))
        else:
            inputs = [x, self._blocks(name, weight), scales, *([points] if points is not None else [])]
            attributes |= {"block_size": weight.block}
            nodes.append(onnx_ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT))
        for index, part in enumerate(weight.trained):
            y = nodes[-1].outputs[0]
            nodes += product_nodes(x, y, f"{name}.trained.{index}", part, self._constant)
        self._put(node, name, nodes)

    def _blocks(self, name: str, weight: PackedWeight) -> onnx_ir.Value:
        """The codes as the node wants them: MatMulNBits [N, blocks, bytes of a block], LinearNBits [N, bytes]."""
        stock = weight.operator != OPERATOR
        return self._constant(
            f"{name}.codes", weight.codes.reshape(weight.N, weight.scales.shape[1], -1) if stock else weight.codes
        )

    def _put(self, node: onnx_ir.Node, name: str, nodes: list[onnx_ir.Node]) -> None:
        """`nodes` in the place of `node`; the last one gives its result."""
        (y,), result = node.outputs, nodes[-1].outputs[0]
        result.shape, result.type = y.shape, y.type
        for index, new in enumerate(nodes):
            new.name = f"{name}.{new.op_type}.{index}"
        onnx_ir.convenience.replace_nodes_and_values(self._model.graph, node, [node], nodes, [y], [result])

    def replace_embedding(self, node: onnx_ir.Node, name: str, weight: PackedWeight) -> None:
        """`node`, a Gather of the rows of a float table, becomes one of the codes and scales of `weight`, which the
        head `name` multiplies with: one table for both, and nothing that only newer runtimes have."""
        table, ids = node.inputs
        assert table is not None
        assert table.dtype is not None
        assert ids is not None
        assert weight.bits in (4, 8)

        def number(key: str, value: float, dtype: torch.dtype) -> onnx_ir.Value:
            return self._constant(f"{name}.{key}", torch.tensor(value, dtype=dtype))

        def shape(key: str, *sizes: int) -> onnx_ir.Value:
            return self._constant(f"{name}.{key}", torch.tensor(sizes))

        last = shape("last", -1)
        nodes = [onnx_ir.node("Gather", [self._blocks(name, weight), ids], {"axis": 0})]  # [batch, rows, …]
        if weight.bits == 4:
            low = onnx_ir.node("BitwiseAnd", [nodes[0].outputs[0], number("low_half", 15, torch.uint8)])
            shift = number("half", 4, torch.uint8)
            high = onnx_ir.node("BitShift", [nodes[0].outputs[0], shift], {"direction": "RIGHT"})
            halves = [onnx_ir.node("Unsqueeze", [half.outputs[0], last]) for half in (low, high)]
            both = onnx_ir.node("Concat", [half.outputs[0] for half in halves], {"axis": -1})
            nodes += [low, high, *halves, both]
        half = table.dtype is onnx_ir.DataType.FLOAT16 and weight.row_scales is None
        kind, dtype = (10, torch.float16) if half else (1, torch.float32)
        codes = onnx_ir.node("Reshape", [nodes[-1].outputs[0], shape("blocks", 0, 0, weight.scales.shape[1], -1)])
        cast = onnx_ir.node("Cast", [codes.outputs[0]], {"to": kind})
        nodes += [codes, cast]

        def add(operator: str, *inputs: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
            nodes.append(onnx_ir.node(operator, inputs, attributes))
            return nodes[-1].outputs[0]

        def of_rows(key: str, values: Tensor, to: int = kind) -> onnx_ir.Value:
            gathered = add("Gather", self._constant(f"{name}.{key}", values), ids, axis=0)
            return add("Cast", gathered, to=to)

        middle = number("middle", 1 << (weight.bits - 1), dtype)
        if weight.row_scales is None:
            scale = of_rows("scales", weight.scales)
            if weight.zero_points is not None:
                each = "zero_points" if weight.zero_kind == "floats" else "zero_points.each"
                middle = add("Unsqueeze", of_rows(each, _one_each(weight)), last)
        else:
            assert weight.zero_points is not None
            steps = self._constant(f"{name}.steps", compact_steps())
            factor = add("Gather", steps, of_rows("scales", weight.scales, to=7), axis=0)
            scale = add("Mul", factor, add("Unsqueeze", of_rows("row_scales", weight.row_scales), last))
            zero = add("Mul", of_rows("zero_points", weight.zero_points), number("unit", 2**weight.bits / 256, dtype))
            middle = add("Unsqueeze", zero, last)
        product = add("Mul", add("Sub", cast.outputs[0], middle), add("Unsqueeze", scale, last))
        rows = add("Reshape", product, shape("row", 0, 0, weight.K))
        if kind != table.dtype.value:
            add("Cast", rows, to=table.dtype.value)
        self._put(node, f"{name}.embedding", nodes)
