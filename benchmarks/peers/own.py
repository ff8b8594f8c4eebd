"""swquant's rows: what `swquant.compress` writes, read back as `swquant.load` reads it.

A tensor that the plan leaves dense is counted with all its 16 bits, as it is stored.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

import swquant
from calibrationless import SUPER_BLOCK, dequantize, quantize_super_blocks
from exporters.gguf.blocks import TYPES, BlockType, type_of
from exporters.gguf.write import Form
from exporters.sidecar import SIDECAR
from peers.base import CELLS, Cell, Method, Original, Outcome, Rounded, gather
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.options import PRESETS, CompressOptions
from swquant.compress.pipeline import prepare, write

__all__ = ["METHODS", "MIN_MAX"]

MIN_MAX = "min/max rounding"


def compressed(options: Mapping[str, Any], *, kept: bool = True) -> Callable[[Original, Cell], Outcome]:
    """Compress to a temporary folder and read the linear weights back. kept: whether stock transformers could read that
    folder; with zero points it wants one block for all weights."""

    def run(original: Original, cell: Cell) -> Outcome:
        chosen = CompressOptions(bits=cell.bits, block=cell.block, **options)
        with tempfile.TemporaryDirectory(prefix="swquant-quality-") as folder:
            out = Path(folder, "out")
            with open_checkpoint(original.folder) as checkpoint:
                manifest = write(prepare(checkpoint, chosen, kept=kept), out).manifest
            return read_back(original, out, manifest)

    return run


def read_back(original: Original, folder: Path, manifest: Mapping[str, Any]) -> Outcome:
    records = {name: manifest["tensors"][name] for name in original.linears}
    sidecar = folder / SIDECAR
    nbytes = sum(record["bytes"] for record in records.values())
    nbytes += sidecar.stat().st_size if sidecar.exists() else 0
    dense = [name for name, record in records.items() if "dense" in record]
    with open_checkpoint(folder) as checkpoint:
        state = {name: checkpoint.read(name).float() for name in original.linears}
        for name in set(checkpoint.tensors) - set(state):  # norms that a scaling of channels went into
            stored, plain = checkpoint.read(name), original.checkpoint.read(name)
            if plain.dim() == 1 and not torch.equal(stored, plain.to(stored.dtype)):
                state[name] = stored.float()
    return Outcome(state, nbytes, (f"{len(dense)} dense: {', '.join(dense)}",) if dense else ())


def row(name: str, cells: Sequence[Cell] = CELLS, *, kept: bool = True, **options: Any) -> Method:
    call = ", ".join(f"{key}={value!r}" for key, value in options.items())
    call = f"swquant.compress(model, out, {call})"
    return Method(name, ("swquant",), call, compressed({"dtype": "bfloat16", **options}, kept=kept), cells)


def onnx_row(name: str, cells: Sequence[Cell], **options: Any) -> Method:
    """The weights that `--format onnx` puts into its nodes, from the folder that it exports: no graph is traced."""
    call = ", ".join(f"{key}={value!r}" for key, value in options.items())
    call = f"swquant.compress(model, out, format='onnx', {call})"
    return Method(name, ("swquant",), call, compressed({"offsets": "byte", **options}), cells)


# The layout of offsets has groups of 32, 64 and 128, and 2, 4 and 8 bits.
_OFFSETS = tuple(Cell(4, block) for block in ("32", "64", "128"))
# What an ONNX folder holds takes any group.
_BYTES = tuple(
    Cell(bits, block) for bits in (4, 3, 2) for block in ("16", "32", "64", "128") if (bits, block) != (3, "16")
)


def super_blocks(original: Original, cell: Cell) -> Outcome:
    """GGUF's k-quant of the cell's bits, searched with the prompt's energy. As for ggml's own, rows are joined where
    256 does not divide one, so that the method itself is measured."""

    def rounded(name: str) -> Rounded:
        weight = original.checkpoint.read(name).float()
        rows, inputs = weight.shape
        joined = math.lcm(inputs, SUPER_BLOCK) // inputs
        importance = original.energies[name].repeat(joined) if name in original.energies else None
        quantized = quantize_super_blocks(weight.reshape(rows // joined, -1), cell.bits, importance=importance)
        kind = type_of(quantized)
        assert isinstance(kind, BlockType)
        return Rounded(dequantize(quantized).reshape(rows, inputs), weight.numel() * kind.bits_per_weight / 8)

    return gather((name, rounded(name)) for name in original.linears)


def gguf_file(name: str) -> Callable[[Original, Cell], Outcome]:
    """The file that `--format gguf` writes, decoded: rows that 256 does not divide are of another type."""

    def run(original: Original, cell: Cell) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="swquant-quality-") as folder:
            written = swquant.compress(original.folder, Path(folder, "out.gguf"), format="gguf", type=name)
            nbytes = sum(
                Form(tensor.name, tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape)))).nbytes
                for tensor in gguf.GGUFReader(written.path).tensors
                if tensor.tensor_type.name in TYPES
            )
            with open_checkpoint(written.path) as checkpoint:
                state = {
                    name: checkpoint.read(name) for name in checkpoint.tensors if name in original.checkpoint.tensors
                }
        return Outcome({name: value for name, value in state.items() if "embed" not in name}, nbytes, ())

    return run


METHODS = [
    row(MIN_MAX, kept=False, preset="fast", symmetric=False),
    *(row(f"swquant {preset}", preset=preset) for preset in PRESETS),
    row("swquant best, outliers", preset="best", outliers=0.0005),
    *(row(f"swquant {preset}, offsets", _OFFSETS, preset=preset, offsets="float") for preset in ("balanced", "best")),
    row("swquant best, offsets and outliers", _OFFSETS, preset="best", offsets="float", outliers=0.0005),
    *(onnx_row(f"swquant {preset}, ONNX", _BYTES, preset=preset) for preset in ("balanced", "best")),
    Method(
        "swquant Q4_K",
        ("swquant",),
        "quantize_super_blocks(weight, 4, importance=energy)",
        super_blocks,
        (Cell(4, "64"),),
    ),
    *(
        Method(
            f"swquant GGUF, {name}",
            ("swquant",),
            f"swquant.compress(model, out, format='gguf', type={name!r})",
            gguf_file(name),
            (Cell(4, "64"),),
        )
        for name in ("Q4_0", "Q4_1", "Q4_K")
    ),
]
