"""The function of swquant::LinearNBits means the same to ONNX Runtime, to onnx's reference evaluator, and to us."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from calibrationless import Points, QuantizedTensor, dequantize, parse_block, quantize, quantize_affine, restore
from exporters.onnx.function import INPUTS, OPSET, Form, linear_function
from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR, PackedWeight, pack_weight

onnxruntime = pytest.importorskip("onnxruntime")

N, K = 24, 96


class MatMulNBits(OpRun):
    """ONNX Runtime's operator as its documentation defines it, for the evaluator, which knows only standard ones."""

    op_domain = MICROSOFT

    def _run(self, a, b, scales, zero_points=None, *, K, N, bits, block_size, accuracy_level=None):  # noqa: N803
        def numbers(stream: np.ndarray) -> np.ndarray:
            flat = np.unpackbits(stream.reshape(N, -1), axis=1, bitorder="little")
            flat = flat[:, : flat.shape[1] // bits * bits].reshape(N, -1, bits)
            return (flat << np.arange(bits)).sum(-1)

        blocks = -(-K // block_size)
        points = np.full((N, blocks), 1 << (bits - 1)) if zero_points is None else numbers(zero_points)[:, :blocks]
        codes = numbers(b).reshape(N, blocks, block_size)
        weight = ((codes - points[:, :, None]) * scales.reshape(N, blocks, 1)).reshape(N, -1)[:, :K]
        return ((a @ weight.T).astype(a.dtype),)


def model_of(weight: PackedWeight, form: Form) -> onnx.ModelProto:
    """One node in a graph, and the function."""
    parts = {
        "B": weight.codes,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "outlier_rows": weight.rows,
        "outlier_cols": weight.cols,
        "outlier_deltas": weight.deltas,
        "row_scales": weight.row_scales,
    }
    initializers = [numpy_helper.from_array(part.numpy(), name) for name, part in parts.items() if part is not None]
    names = [name if name == "A" or parts.get(name) is not None else "" for name in INPUTS]
    attributes = {"K": weight.K, "N": weight.N, "bits": weight.bits, "block_rows": 1, "block_cols": weight.block}
    node = helper.make_node(OPERATOR, names, ["Y"], domain=DOMAIN, accuracy_level=0, **attributes)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "rows", size])
        for name, size in (("A", weight.K), ("Y", weight.N))
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (DOMAIN, 1), (MICROSOFT, 1))]
    graph = helper.make_graph([node], "one", [x], [y], initializers)
    return helper.make_model(graph, functions=[linear_function(form)], opset_imports=imports, ir_version=10)


def rounded(dense: torch.Tensor, block: str, bits: int, zero: str) -> QuantizedTensor:
    if zero in ("floats", "bytes"):
        storage = torch.float16 if zero == "floats" else None
        return quantize_affine(dense, parse_block(block), bits, storage=storage)
    return quantize(dense, parse_block(block), bits, symmetric=not zero)


def wide(quantized: QuantizedTensor) -> QuantizedTensor:
    """The same numbers, decoded in float32 and not rounded to half."""
    offset = None if quantized.offset is None else quantized.offset.float()
    return replace(quantized, scale=quantized.scale.float(), offset=offset)


CASES = list(itertools.product(range(2, 9), ("32", "24", "channel"), ("", "codes", "floats", "bytes"), (True, False)))


@pytest.mark.parametrize(("bits", "block", "zero", "outliers"), CASES)
def test_the_function_is_the_product(bits: int, block: str, zero: str, outliers: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    dense = torch.randn(N, K, generator=generator)
    quantized = rounded(dense, block, bits, zero)
    kept = Points.at(dense, torch.tensor([1, 1, 7]), torch.tensor([3, 90, 5])) if outliers else None
    weight = pack_weight(quantized, kept, torch.float32)
    assert weight.zero_kind == zero
    expected_weight = dequantize(wide(quantized))
    if kept is not None:
        expected_weight = restore(expected_weight, kept)
    x = torch.randn(2, 3, K, generator=generator)
    expected = (x.double() @ expected_weight.double().T).numpy()
    scale = np.abs(expected).max()
    for stock in {weight.stock, False}:  # the unpacking body can do what MatMulNBits can, too
        form = Form(stock, zero, outliers, ragged=weight.K % weight.block != 0)
        model = model_of(weight, form)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (ours,) = session.run(None, {"A": x.numpy()})
        inlined = onnx.inliner.inline_local_functions(model)  # the evaluator keeps operators of ours out of functions
        (theirs,) = ReferenceEvaluator(inlined, new_ops=[MatMulNBits]).run(None, {"A": x.numpy()})
        assert np.abs(ours - expected).max() < 1e-6 * scale
        assert np.abs(theirs - expected).max() < 1e-6 * scale
