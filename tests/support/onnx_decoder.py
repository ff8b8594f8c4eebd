"""The weights of an ONNX folder by numpy alone, from the initializers of LinearNBits nodes and docs/operator.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["decoded"]


def _codes(stream: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """uint8 [rows, bytes], a little-endian stream of bits in each row -> codes."""
    flat = np.unpackbits(stream, axis=1, bitorder="little")
    flat = flat[:, : flat.shape[1] // bits * bits].reshape(len(stream), -1, bits)
    return (flat.astype(np.int64) << np.arange(bits)).sum(-1)


def decoded(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Name of its initializers, without what each is -> weight [N, K], outliers added."""
    model = onnx.load(folder / "model.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "LinearNBits":
            continue
        attributes = {item.name: item.i for item in node.attribute}
        inputs = [constants.get(name) for name in node.input] + [None] * (10 - len(node.input))
        _, codes, scales, zeros, rows, cols, deltas, _, _, row_scales = inputs
        bits, columns = attributes["bits"], attributes["K"]
        zero: object = 2.0 ** (bits - 1)
        if row_scales is not None:
            scale = row_scales[:, None].astype(np.float64) * np.exp2(-(255.0 - scales) / 24)
            zero = zeros * (2.0**bits / 256)
        else:
            scale = scales.astype(np.float64)
            if zeros is not None:
                zero = _codes(zeros, bits)[:, : scale.shape[1]] if zeros.dtype == np.uint8 else zeros
        at = np.arange(columns) // attributes["block_cols"]
        spread = np.broadcast_to(np.asarray(zero, np.float64), scale.shape)
        weight = (_codes(codes, bits)[:, :columns] - spread[:, at]) * scale[:, at]
        if rows is not None:
            np.add.at(weight, (rows, cols), deltas)
        weights[node.input[1].removesuffix(".codes")] = weight
    return weights
