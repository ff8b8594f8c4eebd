"""The operator LinearNBits in numpy, the models that its tests run, and nothing of the C++ that they test.

A `Case` holds what an exported node holds. `reference` computes it in float64 (level 4 with its int8 activations);
`model` is an ONNX file with that one node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.generic]
INPUTS = (
    "A",
    "B",
    "scales",
    "zero_points",
    "outlier_rows",
    "outlier_cols",
    "outlier_deltas",
    "channels",
    "bias",
    "row_scales",
)


def cpu_flags() -> set[str]:
    """What this CPU can do, in the kernel's words."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())


VARIANTS = [
    "portable",
    *(["avx2"] if {"avx2", "fma"} <= cpu_flags() else []),
    *(["avx512"] if "avx512_vnni" in cpu_flags() else []),
]


@dataclass(frozen=True)
class Case:
    """One node: codes [N, K] and what goes with them. `zero_points` uint8 codes or floats, as scales [rows, blocks]."""

    bits: int
    block_rows: int
    block_cols: int
    codes: Array
    scales: Array
    zero_points: Array | None = None
    outliers: tuple[Array, Array, Array] | None = None
    channels: Array | None = None
    bias: Array | None = None
    level: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape  # type: ignore[return-value]

    @property
    def dtype(self) -> np.dtype:
        return self.scales.dtype

    def __str__(self) -> str:
        rows, cols = self.shape
        return f"{self.bits} bits, {self.block_rows}x{self.block_cols}, [{rows}, {cols}], level {self.level}"


def pack(codes: Array, bits: int) -> NDArray[np.uint8]:
    """uint8 [rows, cols] -> each row as a little-endian bit stream of whole bytes, bit by bit."""
    planes = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


def random_case(
    rng: np.random.Generator,
    *,
    bits: int,
    rows: int,
    cols: int,
    block_rows: int = 1,
    block_cols: int,
    zero: str = "none",
    outliers: int = 0,
    channels: int = 0,
    bias: bool = False,
    level: int = 0,
    dtype: type = np.float32,
) -> Case:
    """A case like those an exporter writes: scales of both signs."""
    shape = (-(-rows // block_rows), -(-cols // block_cols))
    codes = rng.integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) / (1 << bits)).astype(dtype)
    zero_points: Array | None = None
    if zero == "integer":
        zero_points = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    elif zero == "float":
        zero_points = rng.uniform(0, 1 << bits, shape).astype(dtype)
    elif zero == "byte":  # between two codes, as an exporter stores them
        zero_points = (rng.integers(0, 256, shape) * (2**bits / 256)).astype(dtype)
    case = Case(bits, block_rows, block_cols, codes, scales, zero_points, level=level)
    if bias:
        case = replace(case, bias=rng.normal(size=rows).astype(dtype))
    taken = rng.choice(cols, min(channels, cols), replace=False).astype(np.int32)
    if outliers:
        flat = np.sort(rng.choice(rows * cols, min(outliers, rows * cols), replace=False))
        at = (flat // cols).astype(np.int32), (flat % cols).astype(np.int32)
        case = replace(case, outliers=(*at, rng.normal(0, 3, len(flat)).astype(np.float32)))
    if channels:
        case = replace(case, channels=taken)
    return case


def dequantize(case: Case) -> NDArray[np.float64]:
    """Ŵ [N, K]"""
    rows, cols = case.shape
    at = np.arange(rows)[:, None] // case.block_rows, np.arange(cols)[None, :] // case.block_cols
    zero = 2.0 ** (case.bits - 1) if case.zero_points is None else case.zero_points.astype(np.float64)[at]
    return (case.codes - zero) * case.scales.astype(np.float64)[at]


def pieces(cols: int, block: int) -> list[tuple[int, int]]:
    """Columns that share an activation scale at level 4: at most 32 of a block."""
    step = min(block, 32)
    edges = [start + offset for start in range(0, cols, block) for offset in range(0, min(block, cols - start), step)]
    return list(zip(edges, [*edges[1:], cols], strict=True))


def round_activations(a: NDArray[np.float32], block: int) -> NDArray[np.float64]:
    """[M, K] to int8 and back, one scale per piece; float32 where the operator uses it, so that ties round alike."""
    result = np.zeros(a.shape)
    for start, end in pieces(a.shape[1], block):
        piece = a[:, start:end].astype(np.float32)
        most = np.abs(piece).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(127) / most
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
        codes = np.rint(piece * inverse)
        result[:, start:end] = codes.astype(np.float64) * (most / np.float32(127)).astype(np.float64)
    return result


def reference(case: Case, a: Array) -> NDArray[np.float64]:
    """Y [M, N] in float64."""
    weights = dequantize(case)
    rest = a.astype(np.float32)
    taken = np.zeros((len(a), case.shape[0]))
    if case.channels is not None and case.level == 4:
        taken = rest[:, case.channels].astype(np.float64) @ weights[:, case.channels].T
        rest = rest.copy()
        rest[:, case.channels] = 0
    product = round_activations(rest, case.block_cols) if case.level == 4 else rest.astype(np.float64)
    y = product @ weights.T + taken
    if case.outliers is not None:
        rows, cols, deltas = case.outliers
        restore = np.zeros(case.shape)
        restore[rows, cols] = deltas
        y = y + a.astype(np.float64) @ restore.T
    return y if case.bias is None else y + case.bias.astype(np.float64)


def initializers(case: Case) -> dict[str, Array]:
    """The constants of the node by the name of its input."""
    rows, cols = case.shape
    padded = np.zeros((rows, -(-cols // case.block_cols) * case.block_cols), np.uint8)
    padded[:, :cols] = case.codes
    result: dict[str, Array] = {"B": pack(padded, case.bits), "scales": case.scales}
    if case.zero_points is not None:
        packed = case.zero_points.dtype == np.uint8
        result["zero_points"] = pack(case.zero_points, case.bits) if packed else case.zero_points
    if case.outliers is not None:
        result |= dict(zip(INPUTS[4:7], case.outliers, strict=True))
    if case.channels is not None:
        result["channels"] = case.channels
    if case.bias is not None:
        result["bias"] = case.bias
    return result


def attributes(case: Case) -> dict[str, int]:
    rows, cols = case.shape
    return {
        "K": cols,
        "N": rows,
        "bits": case.bits,
        "block_rows": case.block_rows,
        "block_cols": case.block_cols,
        "accuracy_level": case.level,
    }


def one_node(constants: dict[str, Array], attributes: dict[str, int], dtype: np.dtype, rank: int = 2) -> bytes:
    """An ONNX model whose one node is LinearNBits; inputs that `constants` lacks are absent."""
    names = ["A", *(name if name in constants else "" for name in INPUTS[1:])]
    while not names[-1]:
        names.pop()
    node = helper.make_node("LinearNBits", names, ["Y"], name="layer.3", domain="swquant", **attributes)
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    shape = [f"d{i}" for i in range(rank)]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", kind, shape)],
        [helper.make_tensor_value_info("Y", kind, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("swquant", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def bfloat_model(case: Case) -> bytes:
    """The same in bfloat16 between casts, because numpy has no such type to feed."""
    loaded = onnx.load_from_string(one_node(initializers(case), attributes(case), case.dtype))
    for name in ("scales", "zero_points", "bias"):
        for tensor in loaded.graph.initializer:
            if tensor.name == name and tensor.data_type == TensorProto.FLOAT:
                values = numpy_helper.to_array(tensor)
                bits = (values.view(np.uint32) >> 16).astype(np.uint16)
                tensor.CopyFrom(helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, bits.tobytes(), raw=True))
    (node,) = loaded.graph.node
    node.input[0], node.output[0] = "a", "y"
    loaded.graph.node.insert(0, helper.make_node("Cast", ["A"], ["a"], to=TensorProto.BFLOAT16))
    loaded.graph.node.append(helper.make_node("Cast", ["y"], ["Y"], to=TensorProto.FLOAT))
    return loaded.SerializeToString()


def session(library: Path, model: bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(library: Path, case: Case, a: Array, threads: int = 1) -> Array:
    model = one_node(initializers(case), attributes(case), case.dtype, a.ndim)
    return session(library, model, threads).run(None, {"A": a})[0]


def assert_close(result: Array, expected: NDArray[np.float64], dtype: str | np.dtype = "float32") -> None:
    """To 1e-5 of the largest value, and half a unit in the last place of a 16-bit result."""
    last = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[str(dtype)]
    error = np.abs(result.astype(np.float64) - expected) - last * 1.01 * np.abs(expected)
    most = np.abs(expected).max(initial=0.0)
    assert error.max(initial=0.0) <= 1e-5 * most, f"{error.max() / most:.2e} of the largest value"
