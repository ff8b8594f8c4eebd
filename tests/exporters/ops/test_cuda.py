"""The CUDA kernels: their source, unmodified, on a CPU, bit for bit; what nvcc makes of it; a device, if there is."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from support.linear_nbits import (
    Array,
    Case,
    assert_close,
    attributes,
    bfloat_model,
    dequantize,
    initializers,
    one_node,
    random_case,
    reference,
    run,
)

from exporters.ops import LIBRARY
from exporters.ops.build import FLAGS, FOLDER, architectures, build_library, find_compiler, find_nvcc

Kernels = Callable[[Case, Array, str, bool], tuple[Array, Array]]


def to_bits(values: Array, kind: str) -> Array:
    """Floats as the kernels read them; bfloat16 is the upper half of a float32."""
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def from_bits(values: Array, kind: str) -> Array:
    if kind == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def exact(values: Array, kind: str) -> Array:
    """The nearest floats that `kind` holds, as float32."""
    return from_bits(to_bits(values, kind), kind)


def chunks(codes: Array, stored: int, padding: Array) -> Array:
    """Codes [N, K] as rows of 16-byte chunks: in each quad of chunks, of every 16 columns four in each chunk; in a
    32-bit word even columns in the lower half. padding: [N] codes of the columns past the last one."""
    spans = 512 // stored // 16
    quads = -(-codes.shape[1] // (16 * spans))
    padded = np.repeat(padding[:, None], quads * spans * 16, axis=1)
    padded[:, : codes.shape[1]] = codes
    dealt = padded.reshape(len(codes), quads, spans, 4, 4).swapaxes(2, 3)
    halves = dealt.reshape(len(codes), -1, 16 // stored, 2).swapaxes(2, 3)
    planes = (halves[..., None] >> np.arange(stored)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """kernels.cu in the emulator, and its reference."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = [*FLAGS, "-O1", "-shared", "-DSWQUANT_EMULATION"]
    subprocess.run([compiler, *flags, FOLDER / "cuda" / "standalone.cc", "-o", path], check=True)
    return kernels_of(path)


@pytest.fixture(scope="session")
def kernels_on_device(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The same on a GPU."""
    nvcc = find_nvcc()
    if nvcc is None or not torch.cuda.is_available():
        pytest.skip("needs nvcc and a CUDA device")
    path = tmp_path_factory.mktemp("device") / "kernels.so"
    flags = ["-std=c++17", "-O3", "--fmad=false", "-arch=native", "-Xcompiler=-fPIC", "-cudart", "static", "-shared"]
    subprocess.run([nvcc, "-x", "cu", *flags, FOLDER / "cuda" / "standalone.cc", "-o", path], check=True)
    return kernels_of(path)


def kernels_of(path: Path) -> Kernels:
    """(case, a, float type, reference?) -> Y [M, N] and Ŵ [N, K], from a compiled standalone.cc."""
    function = ctypes.CDLL(str(path)).swquant_cuda

    def call(case: Case, a: Array, kind: str, of_reference: bool) -> tuple[Array, Array]:
        rows, cols = case.shape
        stored = 2 if case.bits == 2 else 4 if case.bits <= 4 else 8
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        at, outlier_cols, deltas = case.outliers or nothing
        first = np.searchsorted(at, np.arange(rows + 1)).astype(np.int32)
        zero_points = np.full((rows, 1), 2 ** (case.bits - 1)) if case.zero_points is None else case.zero_points
        last = np.repeat(zero_points[:, -1], -(-rows // len(zero_points)))[:rows]
        padding = np.where((last % 1 == 0) & (last >= 0) & (last < 2**stored), last, 0).astype(np.uint8)
        arrays = [
            chunks(case.codes, stored, padding),
            to_bits(case.scales, kind),
            None if case.zero_points is None else to_bits(case.zero_points, kind),
            first,
            outlier_cols,
            deltas,
            None if case.bias is None else to_bits(case.bias, kind),
        ]
        held = [None if array is None else np.ascontiguousarray(array) for array in arrays]
        data = (ctypes.c_void_p * 7)(*(None if array is None else array.ctypes.data for array in held))
        blocks = -(-cols // case.block_cols)
        sizes = np.array([cols, rows, -(-cols * stored // 512) * 4, blocks, case.block_rows, case.block_cols], np.int32)
        bits = np.dtype(np.uint16 if kind == "bfloat16" else kind)
        inputs = np.ascontiguousarray(to_bits(a, kind))
        y, restored = np.zeros((len(a), rows), bits), np.zeros((rows, cols), bits)
        function(
            kind.encode(), stored, of_reference, data, sizes.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_float(2.0 ** (case.bits - 1)), inputs.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(a)),
            y.ctypes.data_as(ctypes.c_void_p), restored.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        return y, restored

    return call


def rounded(case: Case, kind: str) -> Case:
    """The case with scales, zero points and bias that the float type holds exactly."""
    case = replace(case, scales=exact(case.scales, kind), channels=None)
    if case.zero_points is not None and case.zero_points.dtype != np.uint8:
        case = replace(case, zero_points=exact(case.zero_points, kind))
    return case if case.bias is None else replace(case, bias=exact(case.bias, kind))


def assert_right(kernels: Kernels, case: Case, a: Array, kind: str) -> None:
    """The kernels give the bits of the reference in C++, and what numpy says."""
    y, restored = kernels(case, a, kind, False)
    expected_y, expected_restored = kernels(case, a, kind, True)
    assert np.array_equal(y, expected_y)
    assert np.array_equal(restored, expected_restored)
    assert_close(from_bits(y, kind), reference(case, a), kind)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("block", [(1, 32), (1, 128), (3, 5), (1, 300), (33, 300)], ids=lambda b: f"{b[0]}x{b[1]}")
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_give_the_bits_of_the_reference(
    kernels: Kernels, bits: int, block: tuple[int, int], kind: str
) -> None:
    shapes = [(300, 1), (304, 3), (64, 8), (1100, 11), (1, 2)]  # K, rows
    for turn in {(bits + block[1]) % 5, (bits + 3 * len(kind)) % 5}:
        cols, rows = shapes[turn]
        rng = np.random.default_rng([bits, *block, turn])
        case = random_case(
            rng,
            bits=bits,
            rows=33,
            cols=cols,
            block_rows=block[0],
            block_cols=min(block[1], cols),
            zero=("none", "integer", "float")[(turn + bits) % 3],
            outliers=(0, 60)[(turn + bits) % 2],
            bias=bool(turn % 2),
        )
        case = rounded(case, kind)
        a = exact(rng.normal(size=(rows, cols)).astype(np.float32), kind)
        assert_right(kernels, case, a, kind)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("zero", ["none", "integer", "byte", "float"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_kernels_on_a_device(kernels_on_device: Kernels, bits: int, zero: str, kind: str) -> None:
    """Without a runtime: Ŵ has the reference's bits; sums are made in another order."""
    for cols, rows, block in [(1100, 3, 25), (512, 1, 32), (304, 8, 32), (4096, 16, 128), (8208, 11, 32)]:
        rng = np.random.default_rng([bits, cols])
        case = random_case(
            rng, bits=bits, rows=33, cols=cols, block_cols=block, zero=zero, outliers=90, bias=rows % 2 == 0
        )
        case = rounded(case, kind)
        a = exact(rng.normal(size=(rows, cols)).astype(np.float32), kind)
        y, restored = kernels_on_device(case, a, kind, False)
        assert np.array_equal(restored, kernels_on_device(case, a, kind, True)[1])
        assert_close(from_bits(y, kind), reference(case, a), kind)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("cols", [512, 304])
@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_between_two_codes(kernels: Kernels, bits: int, cols: int, kind: str) -> None:
    """In matrix units where the inputs fill whole chunks, and where they do not, by plain sums."""
    rng = np.random.default_rng([bits, cols])
    for rows in (1, 3, 11):
        case = random_case(rng, bits=bits, rows=33, cols=cols, block_cols=32, zero="byte", outliers=60)
        case = rounded(case, kind)
        a = exact(rng.normal(size=(rows, cols)).astype(np.float32), kind)
        assert_right(kernels, case, a, kind)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_the_dequantized_weight_is_restored(kernels: Kernels, kind: str) -> None:
    rng = np.random.default_rng(1)
    case = rounded(random_case(rng, bits=4, rows=33, cols=304, block_cols=32, outliers=100), kind)
    assert case.outliers is not None
    expected = dequantize(case)
    expected[case.outliers[0], case.outliers[1]] += case.outliers[2]
    _, restored = kernels(case, np.zeros((1, 304), np.float32), kind, False)
    assert_close(from_bits(restored, kind), expected, kind)


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    return build_library(tmp_path_factory.mktemp("cuda") / LIBRARY, ["-O1"], emulate_cuda=True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_operator_around_the_kernels(emulated_cuda: Path, bits: int, rows: int) -> None:
    """Loading, checks, launches and the runtime's Gemm for many rows, in an ONNX Runtime session."""
    rng = np.random.default_rng([bits, rows])
    for zero, block, dtype in [
        ("none", 32, np.float32),
        ("integer", 7, np.float32),
        ("float", 128, np.float16),
        ("none", 300, np.float16),
    ]:
        case = random_case(
            rng, bits=bits, rows=33, cols=300, block_cols=block, zero=zero, outliers=40, channels=3, bias=rows % 2 == 0, dtype=dtype
        )  # fmt: skip
        a = rng.normal(size=(rows, 300)).astype(dtype)
        assert_close(run(emulated_cuda, case, a), reference(case, a), case.dtype)


@pytest.mark.slow
def test_nvcc_compiles_from_turing_to_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library with CUDA also loads where there is none, and its CPU kernels work."""
    nvcc = find_nvcc()
    if nvcc is None or find_compiler() is None:
        pytest.skip("needs nvcc and a C++ compiler")
    options = architectures(nvcc)
    assert options[0] == "-gencode=arch=compute_75,code=sm_75"
    assert options[-1].rpartition("code=")[2].startswith("compute_")
    monkeypatch.setenv("SWQUANT_CUDA", "on")
    library = build_library(tmp_path / LIBRARY, ["-O1"])
    rng = np.random.default_rng(0)
    case = random_case(rng, bits=4, rows=40, cols=96, block_cols=32, outliers=3)
    a = rng.normal(size=(3, 96)).astype(np.float32)
    assert_close(run(library, case, a), reference(case, a))


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_on_a_device(library: Path, bits: int, rows: int, kind: str) -> None:
    """The same results on a GPU: `make test-gpu`. TF32 and 16-bit sums of the runtime's Gemm are coarser, and so is
    16-bit Y."""
    settings = [
        (1100, 64, "integer"),
        (1104, 32, "none"),
        (1104, 1104, "integer"),
        (640, 128, "integer"),
        (1024, 32, "byte"),
        (77, 7, "float"),
    ]
    for cols, block, zero in settings:
        rng = np.random.default_rng([bits, rows, cols])
        dtype = np.float16 if kind == "float16" else np.float32
        case = random_case(
            rng, bits=bits, rows=513, cols=cols, block_cols=block, zero=zero, outliers=90, bias=rows % 2 == 1, dtype=dtype
        )  # fmt: skip
        a = exact(rng.normal(size=(rows, cols)).astype(np.float32), kind).astype(dtype)
        if kind == "bfloat16":
            case = rounded(case, kind)
            model = bfloat_model(case)
        else:
            model = one_node(initializers(case), attributes(case), case.dtype)
        y = device_session(library, model).run(None, {"A": a})[0]
        expected = reference(case, a)
        limit = {"float32": 2e-3 if rows > 8 else 1e-5, "float16": 2e-3, "bfloat16": 8e-3}[kind]
        assert np.abs(y.astype(np.float64) - expected).max() <= limit * np.abs(expected).max(), (cols, block, zero)


def device_session(library: Path, model: bytes) -> onnxruntime.InferenceSession:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA (pip install onnxruntime-gpu)")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        pytest.skip("no CUDA device")
    return session
