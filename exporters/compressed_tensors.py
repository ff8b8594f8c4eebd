"""The formats of compressed-tensors that we write: how a quantized weight is named, laid out and declared.

In `pack-quantized` a linear weight `X.weight` becomes

    X.weight_packed      int32 [out, ceil(in * bits / 32)]      codes, lowest bit first (`packing`)
    X.weight_scale       float [out, in / group]                [out, 1] per channel
    X.weight_zero_point  int32 [ceil(out * bits / 32), groups]  asymmetric only, packed along the outputs
    X.weight_shape       int64 [2]                              out, in

which stock transformers (with the compressed-tensors package) and vLLM decode as
`(codes - zero_point) * scale`. In `int-quantized`, for integer products of rows of 8-bit codes with int8 activations
that the loader rounds token by token,

    X.weight        int8 [out, in]     codes - 128
    X.weight_scale  float [out, 1]

`to_tensors` and `from_tensors` are a pure pair on local names.

pack-quantized knows groups along the inputs and whole rows. Other blocks are written by repeating scales:
a tile is a group whose scale occurs in several rows, one scale for the tensor is one per row, all
equal, and a flat block that is a whole number of rows or divides a row is one of these. What is left,
flat blocks that straddle rows, cannot be expressed (`express` says so).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calibrationless import Block, Channel, Flat, Group, QuantizedTensor, Tile, Whole, check_bits, expand
from exporters.packing import pack, packed_words, unpack
from exporters.text import shown

__all__ = [
    "LOCAL_NAMES",
    "Scheme",
    "check_tensors",
    "express",
    "from_tensors",
    "quantization_config",
    "tensor_layout",
    "to_tensors",
]

LOCAL_NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_INT8_INPUTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
    "group_size": None,
}


@dataclass(frozen=True)
class Scheme:
    """What a config group declares. group_size: None for one scale per output channel. int8_inputs: `int-quantized`,
    with inputs that the loader rounds; only for 8 bits, one symmetric scale per output channel. offset: of another
    layout (`affine_layout`)."""

    bits: int
    group_size: int | None
    symmetric: bool
    int8_inputs: bool = False
    offset: bool = False

    def __post_init__(self) -> None:
        if self.int8_inputs and (self.bits, self.group_size, self.symmetric) != (8, None, True):
            raise ValueError(f"int8 inputs want int8 channel symmetric weights, not {self}; declare weights alone")

    @property
    def format(self) -> str:
        return "int-quantized" if self.int8_inputs else "pack-quantized"

    def __str__(self) -> str:
        kind = "channel" if self.group_size is None else f"group {self.group_size}"
        inputs = ", int8 inputs" if self.int8_inputs else ""
        zero = "offset" if self.offset else "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits} {kind} {zero}{inputs}"


def express(block: Block, shape: tuple[int, int]) -> Group | Channel | None:
    """The group or channel that can carry `block` on a [out, in] weight; None if there is none."""
    match block:
        case Group() | Channel():
            return block
        case Whole():
            return Channel()
        case Tile(_, cols):
            return Channel() if cols == shape[1] else Group(cols)
        case Flat(size):
            if size % shape[1] == 0:
                return Channel()
            return Group(size) if shape[1] % size == 0 else None


def _grid(values: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Scales or zero points of any expressible block as [out, groups], repeated where they are shared."""
    target = express(block, shape)
    if target is None:
        raise ValueError(f"block {block} straddles the rows of a {list(shape)} weight")
    if target == block:
        return values
    step = 1 if isinstance(target, Channel) else target.size
    columns = expand(values, block, shape)
    return columns[:, :1].clone() if isinstance(target, Channel) else columns[:, ::step].clone()


def to_tensors(quantized: QuantizedTensor, *, int8_inputs: bool = False) -> dict[str, Tensor]:
    """Local names -> tensors, in the order of `LOCAL_NAMES`. int8_inputs: as `int-quantized`. Raises ValueError for a
    block that straddles rows."""
    shape, bits = quantized.shape, quantized.bits
    if int8_inputs:
        codes = (quantized.codes ^ 128).view(torch.int8)  # code - 128, the bits of which differ in the highest
        return {"weight": codes, "weight_scale": _grid(quantized.scale, quantized.block, shape).contiguous()}
    tensors = {
        "weight_packed": pack(quantized.codes, bits),
        "weight_scale": _grid(quantized.scale, quantized.block, shape).contiguous(),
    }
    if quantized.zero_point is not None:
        zero_point = _grid(quantized.zero_point, quantized.block, shape)
        tensors["weight_zero_point"] = pack(zero_point.T.contiguous(), bits).T.contiguous()
    tensors["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    return tensors


def tensor_layout(
    shape: tuple[int, int],
    block: Block,
    bits: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    int8_inputs: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Local names -> (dtype, shape) of what `to_tensors` will return: the size of a weight before it exists."""
    out_features, in_features = shape
    target = express(block, shape)
    if target is None:
        raise ValueError(f"block {block} straddles the rows of a {list(shape)} weight")
    groups = 1 if isinstance(target, Channel) else in_features // target.size
    if int8_inputs:
        return {"weight": (torch.int8, shape), "weight_scale": (scale_dtype, (out_features, 1))}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (out_features, packed_words(in_features, bits))),
        "weight_scale": (scale_dtype, (out_features, groups)),
    }
    if not symmetric:
        layout["weight_zero_point"] = (torch.int32, (packed_words(out_features, bits), groups))
    layout["weight_shape"] = (torch.int64, (2,))
    return layout


_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = (
    {"weight", "weight_scale"},
    {"weight_packed", "weight_scale", "weight_shape"},
    {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"},
)


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int] | None = None) -> None:
    """Raise ValueError unless local names -> tensors can be decoded: what is read from a file is not trusted.

    Looked at are the names, the dtypes and shapes of all (of codes and zero points no more: they may be on the meta
    device), and the values of weight_scale and weight_shape. shape: [out, in], where it is known from elsewhere.
    """
    if set(tensors) not in _PARTS:
        raise ValueError(f"{shown(sorted(tensors))} are not the parts of one weight")
    check_bits(bits)
    scale = tensors["weight_scale"]
    if "weight" in tensors:
        weight = tensors["weight"]
        declared = list(weight.shape)
        if weight.dtype is not torch.int8 or weight.ndim != 2 or tuple(scale.shape) != (len(weight), 1) or bits != 8:
            raise ValueError(
                f"weight {declared} of {weight.dtype} with {bits} bits contradicts weight_scale {list(scale.shape)}"
            )
    else:
        declared = _check_packed(tensors, bits)
    if shape is not None and declared != list(shape):
        raise ValueError(f"its shape is {declared}, the manifest says {list(shape)}")
    if scale.dtype not in _SCALES:
        raise ValueError(f"weight_scale is of {scale.dtype}, not of {', '.join(map(str, _SCALES))}")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weight_scale holds a NaN or infinite value")


def _check_packed(tensors: Mapping[str, Tensor], bits: int) -> list[int]:
    """The shape [out, in] of a packed weight. Raises ValueError where its parts contradict it."""
    packed, scale, size = (tensors[name] for name in ("weight_packed", "weight_scale", "weight_shape"))
    declared = [int(value) for value in size.flatten()[:8]]
    matrices = size.shape == (2,) and not size.is_floating_point() and packed.ndim == scale.ndim == 2
    if not matrices or min(declared) < 1 or not len(packed) == len(scale) == declared[0]:
        raise ValueError(
            f"weight_shape {declared} contradicts weight_packed {list(packed.shape)}, weight_scale {list(scale.shape)}"
        )
    out_features, in_features = declared
    groups = scale.shape[1]
    if groups == 0 or in_features % groups:
        raise ValueError(f"{groups} scales per row do not divide {in_features} inputs")
    wanted = {"weight_packed": (out_features, packed_words(in_features, bits))}
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        if stored.ndim != 2 or stored.shape[1] != groups:
            raise ValueError(f"weight_zero_point {list(stored.shape)} contradicts weight_scale {list(scale.shape)}")
        wanted["weight_zero_point"] = (packed_words(out_features, bits), groups)
    for name, form in wanted.items():
        if tensors[name].dtype is not torch.int32 or tuple(tensors[name].shape) != form:
            raise ValueError(
                f"{name} {list(tensors[name].shape)} of {tensors[name].dtype} is not {list(form)} of torch.int32, "
                f"which {declared} codes of {bits} bits take"
            )
    return declared


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int] | None = None) -> QuantizedTensor:
    """The inverse of `to_tensors`, with the block as the format sees it (a group or a channel).

    shape: see `check_tensors`. Raises ValueError where that finds something wrong.
    """
    check_tensors(tensors, bits, shape)
    scale = tensors["weight_scale"]
    if "weight" in tensors:
        return QuantizedTensor(tensors["weight"].view(torch.uint8) ^ 128, scale, None, Channel(), bits)
    out_features, in_features = (int(size) for size in tensors["weight_shape"])
    groups = scale.shape[1]
    codes = unpack(tensors["weight_packed"], bits, in_features)
    zero_point = None
    if "weight_zero_point" in tensors:
        zero_point = unpack(tensors["weight_zero_point"].T.contiguous(), bits, out_features).T.contiguous()
    block: Block = Channel() if groups == 1 else Group(in_features // groups)
    return QuantizedTensor(codes, scale, zero_point, block, bits)


def _kind(module: str) -> str:
    """The pattern of all layers of one kind: layers.11.mlp.experts.3.w2 -> .*\\bmlp\\.experts\\.\\d+\\.w2$"""
    _, _, kind = re.sub(r"\.\d+\.", "\0", module, count=1).partition("\0")
    parts = (r"\d+" if part.isdigit() else re.escape(part) for part in (kind or module).split("."))
    return r".*\b" + r"\.".join(parts) + "$"


def _targets(modules: Sequence[str], others: Iterable[str]) -> list[str]:
    """Patterns that match `modules` and none of `others`, as few as can be.

    One regular expression per kind of layer (`re:.*\\.mlp\\.down_proj$`) where that is enough, because
    loaders add and drop prefixes and fuse q/k/v; the full names where it is not.
    """
    taken = list(others)
    patterns: list[str] = []
    by_kind: dict[str, list[str]] = {}
    for module in modules:
        by_kind.setdefault(_kind(module), []).append(module)
    for pattern, members in by_kind.items():
        if any(re.match(pattern, other) for other in taken):  # loaders match from the start of the name
            patterns += members
        else:
            patterns.append("re:" + pattern)
    return patterns


def quantization_config(
    schemes: Mapping[str, Scheme], dense: Sequence[str], version: str, classes: Mapping[Scheme, str] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    schemes: module name -> scheme of every packed weight. dense: names of linear modules left alone. classes: scheme ->
    class of modules that some loader knows by no other name.
    version: of the compressed-tensors layout written (the key `version`).
    """
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        groups.setdefault(scheme, []).append(module)
    config_groups = {}
    for index, (scheme, modules) in enumerate(groups.items()):
        others = [name for name in (*schemes, *dense) if schemes.get(name) != scheme]
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        config_groups[f"group_{index}"] = {
            "targets": _targets(modules, others) + [name for of, name in (classes or {}).items() if of == scheme],
            "weights": weights,
            "input_activations": _INT8_INPUTS if scheme.int8_inputs else None,
            "output_activations": None,
            "format": scheme.format,
        }
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": sorted(dense),
        "version": version,
    }
