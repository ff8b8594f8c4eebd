"""The layouts that a rounded weight can be stored in, a row each. What its recipe says of offsets chooses one to write;
readers tell them apart by the names of a weight's parts.

    none   compressed-tensors, read by transformers and vLLM
    float  MLX's, read by transformers
    byte   ours, on the way to an ONNX file
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calibrationless import Block, Channel, Group, QuantizedTensor, Recipe
from exporters import affine_layout, compact_layout, compressed_tensors

__all__ = ["LAYOUTS", "Layout", "check_tensors", "decoded_dtype", "from_tensors", "tensor_layout", "to_tensors"]

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class _Module(Protocol):
    """What the modules of all layouts have; `compressed_tensors` says what each does."""

    @property
    def LOCAL_NAMES(self) -> tuple[str, ...]: ...  # noqa: N802

    def express(self, block: Block, shape: tuple[int, int]) -> Group | Channel | None: ...
    def check_tensors(self, tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None: ...
    def from_tensors(self, tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor: ...


@dataclass(frozen=True)
class Layout:
    """plan: local names -> (dtype, shape) of a weight before it exists; takes the recipe, the shape, and whether the
    loader rounds its inputs to int8. scale: the part whose dtype decoded weights have, float32 where there is none."""

    name: str
    module: _Module
    plan: Callable[[Recipe, tuple[int, int], bool], Parts]
    scale: str | None

    def express(self, block: Block, shape: tuple[int, int]) -> Group | Channel | None:
        """The group or channel that carries a block on a [out, in] weight, None where it cannot be stored."""
        return self.module.express(block, shape)


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


def _plan_bytes(recipe: Recipe, shape: tuple[int, int], _: bool) -> Parts:
    return compact_layout.tensor_layout(shape, recipe.block, recipe.bits)


# What `Recipe.offsets` says -> where it is stored.
LAYOUTS = {
    "none": Layout("compressed-tensors", compressed_tensors, _plan_integers, "weight_scale"),
    "float": Layout("MLX's layout", affine_layout, _plan_floats, "scales"),
    "byte": Layout("the ONNX operator", compact_layout, _plan_bytes, None),
}
_READ_BY = {frozenset(layout.module.LOCAL_NAMES): layout for layout in LAYOUTS.values()}


def _read_by(names: Iterable[str]) -> Layout:
    """The layout of a weight with parts of these local names; compressed-tensors leaves some of its own out."""
    return _READ_BY.get(frozenset(names), LAYOUTS["none"])


def tensor_layout(recipe: Recipe, shape: tuple[int, int], *, int8_inputs: bool = False) -> Parts:
    """Local names -> (dtype, shape) of what `to_tensors` will return. Raises ValueError for a block that the layout
    cannot hold."""
    return LAYOUTS[recipe.offsets].plan(recipe, shape, int8_inputs)


def to_tensors(quantized: QuantizedTensor, *, int8_inputs: bool = False) -> dict[str, Tensor]:
    """Local names -> tensors of a rounded weight. int8_inputs: see `compressed_tensors.to_tensors`."""
    if quantized.compact is not None:
        return compact_layout.to_tensors(quantized)
    if quantized.offset is not None:
        return affine_layout.to_tensors(quantized)
    return compressed_tensors.to_tensors(quantized, int8_inputs=int8_inputs)


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless local names -> tensors can be decoded to a weight of this shape."""
    _read_by(tensors).module.check_tensors(tensors, bits, shape)


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor:
    """The weight that local names -> tensors hold. Raises ValueError where `check_tensors` does."""
    return _read_by(tensors).module.from_tensors(tensors, bits, shape)


def decoded_dtype(parts: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The dtype of the decoded weight, from local name -> dtype of its parts; None where its scales are missing."""
    scale = _read_by(parts).scale
    return torch.float32 if scale is None else parts.get(scale)
