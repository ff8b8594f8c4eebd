"""ONNX Runtime's quantizers, through `MatMulNBitsQuantizer` on a graph of one MatMul, decoded from what it writes.

A model of 16-bit floats gets 16-bit scales, so that is what is counted. Its operator takes blocks of powers of two;
for one scale per row the default quantizer has `channel_wised_quantize`, and the other algorithms take any block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.base import CELLS, Cell, Method, Rounded, each_weight, group_of

__all__ = ["METHODS"]

FOUR_BITS = tuple(cell for cell in CELLS if cell.bits == 4)


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> float [..., 2 n], low nibble first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()


def graph_of(weight: Tensor) -> Any:
    """A model that is one MatMul by weight [out, in]."""
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = weight.shape
    stored = numpy_helper.from_array(weight.T.contiguous().numpy(), "B")
    node = helper.make_node("MatMul", ["A", "B"], ["Y"], name="matmul")
    wires = [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["n", inputs])]
    ends = [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", outputs])]
    graph = helper.make_graph([node], "linear", wires, ends, [stored])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def decode(model: Any, shape: tuple[int, int], group: int) -> Rounded:
    """MatMulNBits's inputs as a weight [out, in]."""
    from onnx import numpy_helper

    outputs, inputs = shape
    blocks = -(-inputs // group)
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}
    (node,) = model.graph.node
    parts = [arrays[name] for name in node.input[1:] if name]
    codes = nibbles(parts[0].reshape(outputs, blocks, -1))
    scale = parts[1].reshape(outputs, blocks, 1).half().float()
    nbytes = parts[0].nbytes + 2 * scale.numel()
    zero: Tensor | float = 8.0
    if len(parts) > 2 and parts[2].dtype == torch.uint8:
        zero = nibbles(parts[2].reshape(outputs, -1))[:, :blocks].unsqueeze(-1)
        nbytes += parts[2].nbytes
    elif len(parts) > 2:
        zero = parts[2].reshape(outputs, blocks, 1).half().float()
        nbytes += 2 * parts[2].numel()
    decoded = ((codes - zero) * scale).reshape(outputs, -1)[:, :inputs]
    return Rounded(decoded.contiguous(), nbytes)


def decode_rows(model: Any, shape: tuple[int, int], transposed: bool) -> Rounded:
    """DequantizeLinear's inputs with one scale per row as a weight [out, in]. transposed: stored as [out, in]."""
    from onnx import numpy_helper

    outputs, inputs = shape
    arrays = {item.name: item for item in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    codes, *rest = (
        torch.from_numpy(numpy_helper.to_array(arrays[name]).astype("float32")) for name in node.input if name
    )
    codes = codes if transposed else codes.T
    scale, *zero = (part.reshape(-1, 1) for part in rest)
    decoded = (codes - zero[0] if zero else codes) * scale.half().float()
    return Rounded(decoded.contiguous(), outputs * inputs / 2 + 2 * outputs + (outputs / 2 if zero else 0))


def quantizer(configure: Callable[[Any, int, bool], Any], symmetric: bool = False) -> Callable[[Tensor, Cell], Rounded]:
    """configure: (the module, block, whole rows) -> its configuration."""

    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        from onnxruntime.quantization import matmul_nbits_quantizer as module

        module.logger.setLevel("WARNING")
        shape, group = (weight.shape[0], weight.shape[1]), group_of(cell, weight.shape[1])
        config = configure(module, group, cell.block == "channel")
        tool = module.MatMulNBitsQuantizer(graph_of(weight.float()), algo_config=config)
        tool.process()
        if config.quant_format == module.QuantFormat.QDQ:
            return decode_rows(tool.model.model, shape, symmetric)
        return decode(tool.model.model, shape, group)

    return round_one


def searched(function: str, **options: str) -> Callable[[Tensor, Cell], Rounded]:
    """RTN and k_quant by their functions: the pass around them cannot pack rows with an odd number of blocks."""

    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        from onnxruntime.quantization.neural_compressor import weight_only

        group = group_of(cell, weight.shape[1])
        parts = getattr(weight_only, function)(weight.float().numpy(), 4, group, **options)
        codes, scale, zero = (torch.from_numpy(part.astype("float32")) for part in parts)
        decoded = ((codes - zero) * scale.half().float()).reshape(weight.shape)
        rows, blocks = weight.shape[0], weight.shape[1] // group
        return Rounded(decoded, weight.numel() / 2 + rows * (2 * blocks + (blocks + 1) // 2))

    return round_one


def default(symmetric: bool) -> Callable[[Any, int, bool], Any]:
    def configure(module: Any, group: int, rows: bool) -> Any:
        form = module.QuantFormat.QDQ if rows else module.QuantFormat.QOperator
        return module.DefaultWeightOnlyQuantConfig(group, symmetric, quant_format=form, channel_wised_quantize=rows)

    return configure


def row(name: str, call: str, round_one: Callable[[Tensor, Cell], Rounded]) -> Method:
    return Method(f"ONNX Runtime {name}", ("onnxruntime",), call, each_weight(round_one), FOUR_BITS)


METHODS = [
    row(
        "symmetric",
        "MatMulNBitsQuantizer, DefaultWeightOnlyQuantConfig(is_symmetric=True)",
        quantizer(default(True), True),
    ),
    row(
        "asymmetric",
        "MatMulNBitsQuantizer, DefaultWeightOnlyQuantConfig(is_symmetric=False)",
        quantizer(default(False)),
    ),
    row(
        "RTN",
        "quant_tensor, which RTNWeightOnlyQuantConfig runs",
        searched("quant_tensor", scheme="asym", dtype="uint"),
    ),
    row(
        "k_quant",
        "quant_tensor_k_quant_cpu, which KQuantWeightOnlyQuantConfig runs",
        searched("quant_tensor_k_quant_cpu"),
    ),
    row(
        "HQQ",
        "MatMulNBitsQuantizer, HQQWeightOnlyQuantConfig",
        quantizer(lambda module, group, _: module.HQQWeightOnlyQuantConfig(group)),
    ),
]
