"""The affine layout of MLX, as stock transformers reads it (`quant_method: metal`): codes with a real offset per group.

A linear weight `X.weight` of shape [out, in] becomes

    X.weight   uint32 [out, in * bits / 32]   codes, lowest bits first; 2, 4 or 8 bits
    X.scales   float  [out, in / group]
    X.qbiases  float  [out, in / group]       what the code 0 stands for

which decodes as `scales * code + qbiases`, in float32, rounded once to the dtype of the scales. transformers decodes it
while it loads, on any device; on Apple's GPUs it multiplies the codes with MLX's kernels. One scheme holds for all
weights of a checkpoint. mlx-lm has the same layout with other names (`X.biases`, and a key of its own in config.json).

The functions are those of `compressed_tensors`, so that a checkpoint is written and read by either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calibrationless import Block, Group, QuantizedTensor, check_bits
from exporters.packing import pack, packed_words, unpack
from exporters.text import shown

__all__ = [
    "BITS",
    "GROUPS",
    "LOCAL_NAMES",
    "check_tensors",
    "express",
    "from_tensors",
    "quantization_config",
    "tensor_layout",
    "to_tensors",
]

BITS = (2, 4, 8)
GROUPS = (Group(32), Group(64), Group(128))  # of MLX's kernels
LOCAL_NAMES = ("weight", "scales", "qbiases")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def express(block: Block, shape: tuple[int, int]) -> Group | None:
    """The group that can carry `block` on a [out, in] weight; None where the kernels take none."""
    return block if isinstance(block, Group) and block in GROUPS and shape[1] % block.size == 0 else None


def to_tensors(quantized: QuantizedTensor) -> dict[str, Tensor]:
    """Local names -> tensors. Raises ValueError for codes without an offset."""
    if quantized.offset is None or quantized.bits not in BITS:
        raise ValueError(f"{quantized.bits} bits without an offset; this layout holds offsets and {BITS} bits")
    codes = pack(quantized.codes, quantized.bits).view(torch.uint32)
    return {"weight": codes, "scales": quantized.scale.contiguous(), "qbiases": quantized.offset.contiguous()}


def tensor_layout(
    shape: tuple[int, int], block: Block, bits: int, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Local names -> (dtype, shape) of what `to_tensors` will return. Raises ValueError for a block that it cannot
    hold."""
    out_features, in_features = shape
    group = express(block, shape)
    if group is None:
        raise ValueError(f"block {block} is no group of 32, 64 or 128 inputs")
    form = (out_features, in_features // group.size)
    words = (out_features, packed_words(in_features, bits))
    return {"weight": (torch.uint32, words), "scales": (scale_dtype, form), "qbiases": (scale_dtype, form)}


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless local names -> tensors can be decoded to [out, in] = shape."""
    if set(tensors) != set(LOCAL_NAMES):
        raise ValueError(f"{shown(sorted(tensors))} are not the parts of one weight")
    check_bits(bits)
    codes, scales, biases = (tensors[name] for name in LOCAL_NAMES)
    out_features, in_features = shape
    if (
        bits not in BITS
        or codes.dtype is not torch.uint32
        or codes.shape != (out_features, packed_words(in_features, bits))
    ):
        raise ValueError(
            f"weight {list(codes.shape)} of {codes.dtype} does not hold {list(shape)} codes of {bits} bits"
        )
    groups = scales.shape[-1] if scales.ndim == 2 else 0
    if scales.shape != biases.shape or groups < 1 or in_features % groups or len(scales) != out_features:
        raise ValueError(
            f"scales {list(scales.shape)} and qbiases {list(biases.shape)} do not fit a {list(shape)} weight"
        )
    for name, values in (("scales", scales), ("qbiases", biases)):
        if values.dtype not in _FLOATS or values.dtype is not scales.dtype:
            raise ValueError(f"{name} is of {values.dtype}, not of {', '.join(map(str, _FLOATS))}")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} holds a NaN or infinite value")


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor:
    """The inverse of `to_tensors`. Raises ValueError where `check_tensors` finds something wrong."""
    check_tensors(tensors, bits, shape)
    codes = unpack(tensors["weight"].view(torch.int32), bits, shape[1])
    scale = tensors["scales"]
    return QuantizedTensor(codes, scale, None, Group(shape[1] // scale.shape[1]), bits, offset=tensors["qbiases"])


def quantization_config(bits: int, group: int, dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. dense: names of linear modules that hold no codes."""
    return {"quant_method": "metal", "bits": bits, "group_size": group, "modules_to_not_convert": sorted(dense)}
