"""Put quantized linears into a graph: what was a MatMul, or a placeholder for one, becomes the nodes of its packed weight.

plain                             MatMulNBits
outliers, odd bits or blocks      LinearNBits, with a function for runtimes without our library
channels kept in float            around MatMulNBits: Mul by a mask and Gather, which q, k and v (gate and up) share, a
                                  MatMul of a few rows, and Add; LinearNBits takes them as inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from exporters.onnx.function import Form, linear_function
from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR, PackedWeight, with_channels

__all__ = ["Placer", "common_form"]


def common_form(weights: Mapping[str, PackedWeight]) -> tuple[dict[str, PackedWeight], Form | None]:
    """(the weights, the form of the file's LinearNBits nodes or None where there are none).

    One function gives all of them their meaning, so where one has outliers or channels, all get some that change nothing: an
    outlier of zero, a channel that is multiplied apart.
    """
    ours = {name: weight for name, weight in weights.items() if weight.operator == OPERATOR}
    if not ours:
        return dict(weights), None
    form = Form(
        stock=all(weight.stock for weight in ours.values()),
        zero_points=any(weight.zero_points is not None for weight in ours.values()),
        outliers=any(weight.outliers for weight in ours.values()),
        channels=any(weight.channels is not None for weight in ours.values()),
    )
    place, nothing = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for name, weight in ours.items():
        if form.outliers and not weight.outliers:
            weight = replace(weight, rows=place, cols=place, deltas=nothing)
        if form.channels and weight.channels is None:
            weight = with_channels(weight, place)
        ours[name] = weight
    return {**weights, **ours}, form


class Placer:
    """Replaces nodes of one graph. accuracy_level: of all of them."""

    def __init__(self, model: onnx_ir.Model, accuracy_level: int) -> None:
        self._model, self._level = model, accuracy_level
        self._shared: dict[tuple[int, tuple[int, ...]], tuple[onnx_ir.Value, onnx_ir.Value]] = {}
        model.opset_imports[MICROSOFT] = 1

    def add_function(self, form: Form) -> None:
        """Put the meaning of swquant::LinearNBits into the file."""
        function = onnx_ir.serde.deserialize_function(linear_function(form))
        self._model.functions[function.identifier()] = function
        self._model.opset_imports[DOMAIN] = 1

    def _constant(self, name: str, tensor: Tensor | np.ndarray) -> onnx_ir.Value:
        array = tensor.numpy() if isinstance(tensor, Tensor) else tensor
        content = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
        value = onnx_ir.Value(
            name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(content.dtype), const_value=content
        )
        self._model.graph.initializers[name] = value
        return value

    def _without_channels(
        self, name: str, weight: PackedWeight, x: onnx_ir.Value, nodes: list[onnx_ir.Node]
    ) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """(x with the channels at zero, the channels alone), once for all linears that share x."""
        assert weight.channels is not None
        key = (id(x), tuple(weight.channels.tolist()))
        if key not in self._shared:
            mask = torch.ones(weight.K, dtype=weight.scales.dtype)
            mask[weight.channels.to(torch.int64)] = 0
            kept = onnx_ir.node("Mul", [x, self._constant(f"{name}.mask", mask)])
            index = self._constant(f"{name}.channels", weight.channels)
            picked = onnx_ir.node("Gather", [x, index], {"axis": -1})
            nodes += [kept, picked]
            self._shared[key] = (kept.outputs[0], picked.outputs[0])
        return self._shared[key]

    def replace(self, node: onnx_ir.Node, name: str, weight: PackedWeight) -> None:
        """`node`, whose first input is multiplied with the weight `name`, becomes the nodes of `weight`."""
        (x, *_), (y,) = node.inputs, node.outputs
        assert x is not None
        nodes: list[onnx_ir.Node] = []
        attributes = {"K": weight.K, "N": weight.N, "bits": weight.bits, "accuracy_level": self._level}
        scales = self._constant(f"{name}.scales", weight.scales)
        points = None if weight.zero_points is None else self._constant(f"{name}.zero_points", weight.zero_points)
        if weight.operator == OPERATOR:
            codes = self._constant(f"{name}.codes", weight.codes)
            names = ("rows", "cols", "deltas", "channels", "channel_weights")
            extra = [
                None if (part := getattr(weight, key)) is None else self._constant(f"{name}.{key}", part)
                for key in names
            ]
            inputs = [x, codes, scales, points, *extra]
            while inputs[-1] is None:
                inputs.pop()
            attributes |= {"block_rows": 1, "block_cols": weight.block}
            nodes.append(onnx_ir.node(OPERATOR, inputs, attributes, domain=DOMAIN))
        else:
            # MatMulNBits wants [N, blocks, bytes of a block].
            blocks = weight.codes.reshape(weight.N, weight.scales.shape[1], -1)
            picked = None
            if weight.channels is not None:
                x, picked = self._without_channels(name, weight, x, nodes)
            inputs = [x, self._constant(f"{name}.codes", blocks), scales, *([points] if points is not None else [])]
            attributes |= {"block_size": weight.block}
            nodes.append(onnx_ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT))
            if picked is not None:
                assert weight.channel_weights is not None
                apart = onnx_ir.node(
                    "MatMul", [picked, self._constant(f"{name}.channel_weights", weight.channel_weights)]
                )
                nodes += [apart, onnx_ir.node("Add", [nodes[-1].outputs[0], apart.outputs[0]])]
        result = nodes[-1].outputs[0]
        result.shape, result.type = y.shape, y.type
        for index, new in enumerate(nodes):
            new.name = f"{name}.{new.op_type}.{index}"
        graph = self._model.graph
        onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [y], [result])
