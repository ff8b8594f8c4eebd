"""llama.cpp's types, by ggml's own quantizer (`ggml_quantize_chunk`), without and with an importance matrix.

The matrix holds the mean square of every input over the calibration text; the rows with one prompt have swquant's in
its place, for which no text is read.

Their blocks are fixed (32 weights, or super-blocks of 256), so each type has one place: the cell nearest in stored
bits. Super-blocks run along a row; where 256 does not divide a row, several rows are joined, so that the method
itself is measured. llama.cpp would store such a tensor as another, larger type (Q4_K as Q5_0).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peers.base import PLAIN, PROMPT, TEXT, Cell, Importance, Method, Original, Outcome, Rounded, gather

__all__ = ["METHODS", "TYPES", "dequantize", "quantize", "quantizer"]

PACKAGES = ("libggml-python",)
# name -> (number in ggml.h, the cell nearest in stored bits)
TYPES = {
    "Q4_0": (2, Cell(4, "64")),
    "Q4_1": (3, Cell(4, "64")),
    "IQ4_NL": (20, Cell(4, "64")),
    "Q4_K": (12, Cell(4, "64")),
    "IQ4_XS": (23, Cell(4, "64")),
    "Q3_K": (11, Cell(3, "64")),
    "IQ3_S": (21, Cell(3, "64")),
    "IQ3_XXS": (18, Cell(3, "channel")),
}


class Traits(ctypes.Structure):
    """`struct ggml_type_traits`, as far as it is read here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def library() -> ctypes.CDLL:
    import libggml

    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantizer(name: str) -> Traits:
    """What ggml knows of a type."""
    return library().ggml_get_type_traits(TYPES[name][0]).contents


def quantize(weight: Tensor, name: str, importance: Tensor | None = None, threads: int = 1) -> Tensor:
    """float32 [out, in] -> uint8 [bytes]; 256 divides a row, or rows can be joined so that it does.

    importance: float32 [in], the mean square of each input. threads: rows are shared among them, as llama.cpp does it.
    """
    rows, inputs = weight.shape
    joined = math.lcm(inputs, quantizer(name).block) // inputs
    if rows % joined:
        raise ValueError(f"{rows} rows of {inputs} weights are not a whole number of super-blocks")
    kept = None if importance is None else importance.repeat(joined).contiguous()
    packed = torch.empty(weight.numel() * quantizer(name).type_size // quantizer(name).block, dtype=torch.uint8)
    rows, inputs = rows // joined, inputs * joined
    share = -(-rows // threads)

    def part(first: int) -> int:
        return library().ggml_quantize_chunk(  # lets go of the interpreter's lock
            TYPES[name][0],
            weight.data_ptr(),
            packed.data_ptr(),
            first * inputs,
            min(share, rows - first),
            inputs,
            None if kept is None else kept.data_ptr(),
        )

    if threads == 1:
        written = part(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            written = sum(pool.map(part, range(0, rows, share)))
    if written != len(packed):
        raise ValueError(f"ggml wrote {written} bytes of {name}, not {len(packed)}")
    return packed


def dequantize(packed: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    """uint8 [bytes] -> float32 [out, in]."""
    decoded = torch.empty(shape)
    quantizer(name).to_float(packed.data_ptr(), decoded.data_ptr(), decoded.numel())
    return decoded


def rounded(weight: Tensor, name: str, importance: Tensor | None = None) -> Rounded:
    packed = quantize(weight.float().contiguous(), name, importance)
    return Rounded(dequantize(packed, name, (weight.shape[0], weight.shape[1])), len(packed))


def run(name: str, importance: Importance) -> Callable[[Original, Cell], Outcome]:
    def all_weights(original: Original, cell: Cell) -> Outcome:
        read, weights = original.checkpoint.read, importance.of(original)
        return gather((tensor, rounded(read(tensor), name, weights.get(tensor))) for tensor in original.linears)

    return all_weights


def row(name: str, importance: Importance, matrix: str) -> Method:
    call = f"ggml_quantize_chunk({name}, imatrix={matrix})"
    cells = (TYPES[name][1],)
    return Method(
        f"llama.cpp {name}{importance.name}", PACKAGES, call, run(name, importance), cells, importance.calibrated
    )


WEIGHED = ("Q4_K", "IQ4_XS", "Q3_K")
METHODS = [
    *(row(name, PLAIN, "NULL") for name in TYPES),
    *(row(name, PROMPT, "energy of the inputs on swquant's prompt") for name in WEIGHED),
    *(row(name, TEXT, "mean squares over the calibration text") for name in WEIGHED),
]
