"""Rounded weights as MLX stores them: `w = scale * code + bias`, groups of 32, 64 or 128 along the inputs.

For a module X of shape [out, in], bits b and groups of g:

    X.weight   uint32 [out, in * b / 32]   codes, lowest bits first, a stream over word boundaries
    X.scales   float  [out, in / g]
    X.biases   float  [out, in / g]        what the code 0 stands for

Codes with a real offset are that already (`affine_layout` is this layout under transformers' names). Of symmetric codes
the bias is `-2^(b-1) * scale`, a power of two times the scale, so nothing is rounded. Zero points are refused: their
product with the scale does not fit the scale's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibrationless import QuantizedTensor
from exporters.packing import pack, packed_words

__all__ = ["BITS", "GROUPS", "LOCAL_NAMES", "quantization_config", "tensor_layout", "to_tensors", "why_not"]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)  # of MLX's kernels
LOCAL_NAMES = ("weight", "scales", "biases")


def why_not(bits: int, group: int, *, zero_points: bool) -> str | None:
    """Why MLX cannot hold codes in groups of so many inputs, None where it can."""
    if bits not in BITS:
        return f"{bits} bits; it knows {', '.join(map(str, BITS))}"
    if group not in GROUPS:
        return f"{group} inputs to a scale; it knows groups of {', '.join(map(str, GROUPS))}"
    if zero_points:
        return "zero points, whose products with scales would be rounded again; it knows real offsets (--offsets float)"
    return None


def to_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Local names -> tensors. Raises ValueError where `why_not` says why."""
    scale, inputs = quantized.scale, quantized.codes.shape[1]
    zero_points = quantized.zero_point is not None
    if problem := why_not(quantized.bits, inputs // scale.shape[1], zero_points=zero_points):
        raise ValueError(f"MLX cannot hold {problem}")
    biases = quantized.offset if quantized.offset is not None else scale * -(2 ** (quantized.bits - 1))
    codes = pack(quantized.codes, quantized.bits).view(torch.uint32)
    return {"weight": codes, "scales": scale.contiguous(), "biases": biases.contiguous()}


def tensor_layout(
    shape: tuple[int, int], group: int, bits: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Local names -> (dtype, shape) of what `to_tensors` returns for a [out, in] weight with scales of `dtype`."""
    form = (shape[0], shape[1] // group)
    return {
        "weight": (torch.uint32, (shape[0], packed_words(shape[1], bits))),
        "scales": (dtype, form),
        "biases": (dtype, form),
    }


def quantization_config(schemes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The `quantization` of config.json. schemes: module -> (bits, group); the commonest stands for all, the others by
    name."""
    counts: dict[tuple[int, int], int] = {}
    for scheme in schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    common = max(counts, key=counts.__getitem__)
    own = {
        module: {"group_size": group, "bits": bits}
        for module, (bits, group) in schemes.items()
        if (bits, group) != common
    }
    return {"group_size": common[1], "bits": common[0], **own}
