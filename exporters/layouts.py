"""The layouts that a rounded weight can be stored in: what has offsets is written in that of MLX, all else in those of
compressed-tensors. Readers tell them apart by the names of a weight's parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from torch import Tensor

from calibrationless import QuantizedTensor
from exporters import affine_layout, compressed_tensors

__all__ = ["check_tensors", "from_tensors", "scale_name", "to_tensors"]


def _layout(names: Iterable[str]) -> ModuleType:
    return affine_layout if set(names) == set(affine_layout.LOCAL_NAMES) else compressed_tensors


def to_tensors(quantized: QuantizedTensor, *, int8_inputs: bool = False) -> dict[str, Tensor]:
    """Local names -> tensors of a rounded weight. int8_inputs: see `compressed_tensors.to_tensors`."""
    if quantized.offset is not None:
        return affine_layout.to_tensors(quantized)
    return compressed_tensors.to_tensors(quantized, int8_inputs=int8_inputs)


def check_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> None:
    """Raise ValueError unless local names -> tensors can be decoded to a weight of this shape."""
    _layout(tensors).check_tensors(tensors, bits, shape)


def from_tensors(tensors: Mapping[str, Tensor], bits: int, shape: Sequence[int]) -> QuantizedTensor:
    """The weight that local names -> tensors hold. Raises ValueError where `check_tensors` does."""
    quantized: QuantizedTensor = _layout(tensors).from_tensors(tensors, bits, shape)
    return quantized


def scale_name(names: Iterable[str]) -> str:
    """The local name of the scales among those of a weight's parts."""
    return "scales" if _layout(names) is affine_layout else "weight_scale"
