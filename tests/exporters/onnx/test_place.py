"""Weights put into a graph: two linears on one input, in every arithmetic, with channels multiplied apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from support.linear_nbits import round_activations

from calibrationless import Points, dequantize, parse_block, quantize, quantize_affine, restore
from exporters.onnx.nodes import PackedWeight, pack_weight, stack, take_rows
from exporters.onnx.place import Placer, common_form
from exporters.ops import library_path

onnxruntime = pytest.importorskip("onnxruntime")

K, N = 128, 24
GENERATOR = torch.Generator().manual_seed(0)


def linear(outliers: bool, bits: int = 4, rows: int = N, zero: str = "") -> tuple[PackedWeight, torch.Tensor]:
    """(packed, what it stands for). zero: the kind of its zero points."""
    dense = torch.randn(rows, K, generator=GENERATOR)
    if zero:
        storage = torch.float32 if zero == "floats" else None
        quantized = quantize_affine(dense, parse_block("32"), bits, storage=storage)
    else:
        quantized = quantize(dense, parse_block("32"), bits)
    decoded = dequantize(quantized)
    if not outliers:
        return pack_weight(quantized, None, torch.float32), decoded
    kept = Points.at(dense, torch.tensor([1, 7, 9]), torch.tensor([77, 0, 77]))
    return pack_weight(quantized, kept, torch.float32), restore(decoded, kept)


def build(weights: dict[str, PackedWeight], level: int) -> onnx_ir.Model:
    """A graph in which MatMuls of the same x were replaced."""
    value = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["rows", K]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    nodes = [onnx_ir.node("MatMul", [value, value]) for _ in weights]
    for node, (name, weight) in zip(nodes, weights.items(), strict=True):
        node.outputs[0].name = name
        node.outputs[0].shape = onnx_ir.Shape(["rows", weight.N])
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph(
        [value], [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 21}, name="two linears"
    )
    model = onnx_ir.Model(graph, ir_version=10)
    placer = Placer(model)
    packed, form = common_form({name: replace(weight, accuracy_level=level) for name, weight in weights.items()})
    if form is not None:
        placer.add_function(form)
    for node, name in zip(nodes, weights, strict=True):
        placer.replace(node, name, packed[name])
    return model


def run(weights: dict[str, PackedWeight], level: int, x: np.ndarray, library: Path | None = None) -> list[np.ndarray]:
    """Each weight times x, on our library or as the file's function says."""
    proto = onnx_ir.serde.serialize_model(build(weights, level))
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("outliers", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bits", [(4, 4), (3, 4)])
@pytest.mark.parametrize("channels", [None, [5, 77]])
@pytest.mark.parametrize("zero", ["", "floats", "bytes"])
def test_the_nodes_multiply(
    outliers: tuple[bool, bool], bits: tuple[int, int], channels: list[int] | None, zero: str
) -> None:
    """At level 0 channels change nothing, also where an outlier lies in one."""
    first, dense_first = linear(outliers[0], bits[0], zero=zero)
    second, dense_second = linear(outliers[1], bits[1], rows=40, zero="bytes" if zero == "bytes" else "")
    if channels:
        second = replace(second, channels=torch.tensor(channels, dtype=torch.int32))
    x = torch.randn(3, K, generator=GENERATOR)
    for ours, dense in zip(run({"a": first, "b": second}, 0, x.numpy()), (dense_first, dense_second), strict=True):
        expected = (x.double() @ dense.double().T).numpy()
        assert np.abs(ours - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("bits", "kept"), [(3, None), (4, None), (4, [5, 77])])
def test_with_and_without_zero_points_in_one_file(bits: int, kept: list[int] | None) -> None:
    """One function serves both, as where the body of a model is asymmetric and its output head is not."""
    dense = torch.randn(2, N, K, generator=GENERATOR)
    channels = None if kept is None else torch.tensor(kept, dtype=torch.int32)
    sides = [quantize(dense[0], parse_block("32"), bits, symmetric=False), quantize(dense[1], parse_block("32"), 8)]
    weights = [replace(pack_weight(side, None, torch.float32), channels=channels) for side in sides]
    x = torch.randn(3, K, generator=GENERATOR)
    for ours, side in zip(run(dict(zip("ab", weights, strict=True)), 0, x.numpy()), sides, strict=True):
        expected = (x.double() @ dequantize(side).double().T).numpy()
        assert np.abs(ours - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("outliers", [False, True])
def test_a_super_activation_does_not_spoil_level_4(outliers: bool) -> None:
    weight, dense = linear(outliers)
    calm = torch.randn(4, K, generator=GENERATOR)
    spiked = calm.clone()
    spiked[:, 77] = 3000.0

    def error(x: torch.Tensor, packed: PackedWeight) -> float:
        (ours,) = run({"y": packed}, 4, x.numpy())
        return float(np.abs(ours - (x.double() @ dense.double().T).numpy()).max())

    kept = replace(weight, channels=torch.tensor([77], dtype=torch.int32))
    usual = error(calm, weight)
    assert usual > 0  # level 4 rounds
    assert error(spiked, weight) > 20 * usual
    assert error(spiked, kept) < 2 * usual


@pytest.mark.parametrize("ours", [False, True], ids=["function", "library"])
def test_an_outlier_in_a_channel_that_is_multiplied_apart_counts_once(ours: bool) -> None:
    """Outliers at [1, 77], [7, 0] and [9, 77]; channel 77 is taken out, where alone level 4 rounds nothing."""
    library = library_path() if ours else None
    if ours and library is None:
        pytest.skip("no operator library")
    weight, dense = linear(True)
    kept = replace(weight, channels=torch.tensor([77], dtype=torch.int32))
    assert weight.rows is not None
    assert weight.cols is not None
    assert weight.deltas is not None
    exact = dense.double().numpy()
    missing = np.zeros_like(exact)
    missing[weight.rows, weight.cols] = weight.deltas
    decoded = exact - missing
    assert np.abs(missing[:, 77]).max() > 0.01  # worth seeing
    x = np.zeros((3, K), np.float32)
    x[:, 77] = [3000.0, -1.0, 0.25]
    (y,) = run({"y": kept}, 4, x, library)
    expected = x.astype(np.float64) @ exact.T
    assert np.abs(y - expected).max() < 1e-6 * np.abs(expected).max()
    x[:, :77] = torch.randn(3, 77, generator=GENERATOR).numpy()
    (y,) = run({"y": kept}, 4, x, library)
    # numpy: every other channel rounded to int8 by blocks, outliers and channel exactly.
    calm = x.copy()
    calm[:, 77] = 0
    rounded = round_activations(calm, weight.block)
    apart = x.astype(np.float64) - calm
    expected = rounded @ decoded.T + apart @ decoded.T + x.astype(np.float64) @ missing.T
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


def test_stacked_weights_are_the_weights_one_after_the_other() -> None:
    parts = [linear(True)[0], linear(False)[0], linear(True, rows=40)[0]]
    x = torch.randn(2, K, generator=GENERATOR).numpy()
    (whole,) = run({"all": stack(parts)}, 0, x)
    apart = run({str(index): part for index, part in enumerate(parts)}, 0, x)
    assert np.abs(whole - np.concatenate(apart, axis=1)).max() < 1e-5
    (half,) = run({"half": take_rows(stack(parts), N, 2 * N + 40)}, 0, x)
    assert np.abs(half - np.concatenate(apart[1:], axis=1)).max() < 1e-5


def test_weights_that_differ_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="cannot share a node"):
        stack([linear(False)[0], linear(False, bits=8)[0]])


def test_a_stock_runtime_masks_once_and_folds_the_weights_of_channels(tmp_path: Path) -> None:
    """Linears of the same input share what is done to it, and nothing constant is left to do while the model runs."""
    weights = {name: replace(linear(False)[0], channels=torch.tensor([5], dtype=torch.int32)) for name in "qkv"}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    proto = onnx_ir.serde.serialize_model(build(weights, 4))
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx_ir.load(tmp_path / "optimized.onnx").graph]
    assert [kinds.count(kind) for kind in ("Mul", "Gather", "MatMulNBits")] == [1, 1, 3]
    assert {*kinds} <= {"Mul", "Gather", "MatMulNBits", "MatMul", "Gemm", "Add"}


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("channels", [None, [5, 77]])
def test_scales_that_half_holds_are_stored_in_half(level: int, channels: list[int] | None) -> None:
    """Of LinearNBits only, and with the same results as in float, on our library and on the runtime's own operators."""
    dense, x = torch.randn(2, N, K, generator=GENERATOR), torch.randn(3, K, generator=GENERATOR).numpy()
    kept = Points.at(dense[0], torch.tensor([1, 7]), torch.tensor([77, 0]))
    taken = None if channels is None else torch.tensor(channels, dtype=torch.int32)
    exact, inexact = (
        quantize(dense[0], parse_block("32"), 4, scale_dtype=dtype) for dtype in (torch.float16, torch.float32)
    )
    weights = {
        "exact": replace(pack_weight(exact, kept, torch.float32), channels=taken),
        "inexact": replace(pack_weight(inexact, kept, torch.float32), channels=taken),
        "plain": pack_weight(quantize(dense[1], parse_block("32"), 4, scale_dtype=torch.float16), None, torch.float32),
    }
    initializers = build(weights, level).graph.initializers
    found = {name: initializers[f"{name}.scales"].dtype for name in weights}
    wide = onnx_ir.DataType.FLOAT
    assert found == {"exact": onnx_ir.DataType.FLOAT16, "inexact": wide, "plain": wide}
    expected = run({name: weight for name, weight in weights.items() if name != "exact"}, level, x)
    for library in {None, library_path()}:
        first, *others = run(weights, level, x, library)
        decoded = restore(dequantize(replace(exact, scale=exact.scale.float())), kept).numpy()
        if level == 0:
            assert np.abs(first - x @ decoded.T).max() < 1e-5 * np.abs(first).max()
        for ours, theirs in zip(others, expected, strict=True):
            assert np.abs(ours - theirs).max() <= (0 if library is None else 0.02) * np.abs(theirs).max()
