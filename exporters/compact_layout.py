"""The layout on the way to an ONNX file: codes whose scale and offset are a byte each (`calibrationless.Compact`).

A linear weight `X.weight` of shape [out, in] becomes

    X.codes       int32   [out, ceil(in * bits / 32)]   lowest bit first (`packing`); 2 to 8 bits
    X.row_scales  float16 [out]
    X.exponents   uint8   [out, in / group]             scale = row_scales * 2^(-(255 - exponent) / 24)
    X.zeros       uint8   [out, in / group]             offset = -scale * zero * 2^bits / 256

No loader of checkpoints knows it, so a folder with it is never left to a user: `compress --format onnx` writes one,
exports it, and removes it. The functions are those of `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibrationless import Block, Channel, Compact, Group, QuantizedTensor, check_bits, from_compact
from exporters.packing import pack, packed_words, unpack
from exporters.text import shown

__all__ = ["LOCAL_NAMES", "check_tensors", "express", "from_tensors", "tensor_layout", "to_tensors"]

LOCAL_NAMES = ("codes", "row_scales", "exponents", "zeros")


def express(block: Block, shape: tuple[int, int]) -> Group | Channel | None:
    """The group or channel that can carry `block` on a [out, in] weight; None if there is none."""
    match block:
        case Channel():
            return block
        case Group(size) if shape[1] % size == 0:
            return block
    return None


def tensor_layout(shape: tuple[int, int], block: Block, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Local names -> (dtype, shape) of what `to_tensors` will return. Raises ValueError for a block that it cannot
    hold."""
    carried = express(block, shape)
    if carried is None:
        raise ValueError(f"block {block} is no group within a row, nor a channel")
    form = (shape[0], shape[1] // carried.size if isinstance(carried, Group) else 1)
    codes = (torch.int32, (shape[0], packed_words(shape[1], bits)))
    return {
        "codes": codes,
        "row_scales": (torch.float16, shape[:1]),
        "exponents": (torch.uint8, form),
        "zeros": (torch.uint8, form),
    }


def to_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Local names -> tensors. Raises ValueError where scale and offset are not a byte each."""
    compact = quantized.compact
    if compact is None:
        raise ValueError("scale and offset are no bytes; this layout holds nothing else")
    return {
        "codes": pack(quantized.codes, quantized.bits),
        "row_scales": compact.rows,
        "exponents": compact.exponents.contiguous(),
        "zeros": compact.zeros.contiguous(),
    }


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless local names -> tensors can be decoded to [out, in] = shape."""
    if set(tensors) != set(LOCAL_NAMES):
        raise ValueError(f"{shown(sorted(tensors))} are not the parts of one weight")
    check_bits(bits)
    out_features, in_features = shape
    groups = tensors["exponents"].shape[-1] if tensors["exponents"].ndim == 2 else 0
    if groups < 1 or in_features % groups:
        raise ValueError(f"{groups} scales per row do not divide {in_features} inputs")
    block: Block = Group(in_features // groups) if groups > 1 else Channel()
    for name, (dtype, form) in tensor_layout((out_features, in_features), block, bits).items():
        if tensors[name].dtype is not dtype or tuple(tensors[name].shape) != form:
            raise ValueError(
                f"{name} {list(tensors[name].shape)} of {tensors[name].dtype} is not {list(form)} of {dtype}"
            )
    if not bool(torch.isfinite(tensors["row_scales"]).all()):
        raise ValueError("row_scales holds a NaN or infinite value")


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor:
    """The inverse of `to_tensors`. Raises ValueError where `check_tensors` finds something wrong."""
    check_tensors(tensors, bits, shape)
    groups = tensors["exponents"].shape[1]
    return from_compact(
        unpack(tensors["codes"], bits, shape[1]),
        Compact(tensors["row_scales"], tensors["exponents"], tensors["zeros"]),
        Group(shape[1] // groups) if groups > 1 else Channel(),
        bits,
    )
