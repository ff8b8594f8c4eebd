"""The layouts that a rounded weight can be stored in, a row each. What its recipe says of offsets chooses one to write;
readers tell them apart by the names of a weight's parts.

    none   compressed-tensors, read by transformers and vLLM
    float  MLX's, read by transformers
    byte   ours, on the way to an ONNX file
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless import Block, Channel, Group, QuantizedTensor, Recipe
from exporters import affine_layout, compact_layout, compressed_tensors

__all__ = ["LAYOUTS", "Layout", "check_tensors", "decoded_dtype", "from_tensors", "tensor_layout", "to_tensors"]

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """express: the group or channel that carries a block on a [out, in] weight, None where it cannot be stored. plan:
    local names -> (dtype, shape) of a weight before it exists; takes the recipe, the shape, and whether the loader
    rounds its inputs to int8. The others: see `compressed_tensors`, which all layouts' modules are like. scale: the
    part whose dtype decoded weights have, float32 where there is none."""

    name: str
    express: Callable[[Block, tuple[int, int]], Group | Channel | None]
    plan: Callable[[Recipe, tuple[int, int], bool], Parts]
    to_tensors: Callable[[QuantizedTensor, bool], dict[str, Tensor]]
    check_tensors: Callable[[Mapping[str, Tensor], int, Sequence[int]], None]
    from_tensors: Callable[[Mapping[str, Tensor], int, Sequence[int]], QuantizedTensor]
    scale: str | None


def _plan_integers(recipe: Recipe, shape: tuple[int, int], int8_inputs: bool) -> Parts:
    assert recipe.scale_dtype is not None
    return compressed_tensors.tensor_layout(
        shape,
        recipe.block,
        recipe.bits,
        symmetric=recipe.symmetric,
        scale_dtype=recipe.scale_dtype,
        int8_inputs=int8_inputs,
    )


def _plan_floats(recipe: Recipe, shape: tuple[int, int], _: bool) -> Parts:
    assert recipe.scale_dtype is not None
    return affine_layout.tensor_layout(shape, recipe.block, recipe.bits, recipe.scale_dtype)


_INTEGERS = Layout(
    name="compressed-tensors",
    express=compressed_tensors.express,
    plan=_plan_integers,
    to_tensors=lambda quantized, int8_inputs: compressed_tensors.to_tensors(quantized, int8_inputs=int8_inputs),
    check_tensors=compressed_tensors.check_tensors,
    from_tensors=compressed_tensors.from_tensors,
    scale="weight_scale",
)
_FLOATS = Layout(
    name="MLX's layout",
    express=affine_layout.express,
    plan=_plan_floats,
    to_tensors=lambda quantized, _: affine_layout.to_tensors(quantized),
    check_tensors=affine_layout.check_tensors,
    from_tensors=affine_layout.from_tensors,
    scale="scales",
)
_BYTES = Layout(
    name="the ONNX operator",
    express=compact_layout.express,
    plan=lambda recipe, shape, _: compact_layout.tensor_layout(shape, recipe.block, recipe.bits),
    to_tensors=lambda quantized, _: compact_layout.to_tensors(quantized),
    check_tensors=compact_layout.check_tensors,
    from_tensors=compact_layout.from_tensors,
    scale=None,
)
# What `Recipe.offsets` says -> where it is stored.
LAYOUTS = {"none": _INTEGERS, "float": _FLOATS, "byte": _BYTES}


def _read_by(names: Iterable[str]) -> Layout:
    """The layout of a weight with parts of these local names."""
    odd = {frozenset(affine_layout.LOCAL_NAMES): _FLOATS, frozenset(compact_layout.LOCAL_NAMES): _BYTES}
    return odd.get(frozenset(names), _INTEGERS)


def tensor_layout(recipe: Recipe, shape: tuple[int, int], *, int8_inputs: bool = False) -> Parts:
    """Local names -> (dtype, shape) of what `to_tensors` will return. Raises ValueError for a block that the layout
    cannot hold."""
    return LAYOUTS[recipe.offsets].plan(recipe, shape, int8_inputs)


def to_tensors(quantized: QuantizedTensor, *, int8_inputs: bool = False) -> dict[str, Tensor]:
    """Local names -> tensors of a rounded weight. int8_inputs: see `compressed_tensors.to_tensors`."""
    layout = _BYTES if quantized.compact is not None else _FLOATS if quantized.offset is not None else _INTEGERS
    return layout.to_tensors(quantized, int8_inputs)


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless local names -> tensors can be decoded to a weight of this shape."""
    _read_by(tensors).check_tensors(tensors, bits, shape)


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor:
    """The weight that local names -> tensors hold. Raises ValueError where `check_tensors` does."""
    return _read_by(tensors).from_tensors(tensors, bits, shape)


def decoded_dtype(parts: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The dtype of the decoded weight, from local name -> dtype of its parts; None where its scales are missing."""
    scale = _read_by(parts).scale
    return torch.float32 if scale is None else parts.get(scale)
