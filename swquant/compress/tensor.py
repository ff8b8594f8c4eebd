"""One tensor."""

from __future__ import annotations

import torch

from calibrationless import (
    Outliers,
    QuantizedTensor,
    block_elements,
    block_index,
    for_pieces,
    quantize,
    worst,
)
from exporters.errors import SwquantError
from swquant.compress.options import CompressOptions
from swquant.compress.plan import TensorPlan

__all__ = ["cast", "check_finite", "choose_outliers", "coordinates", "round_weight"]


def _all_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point():
        return True
    values = weight.flatten()

    def finite(piece: slice) -> bool:  # of a whole embedding, the temporaries would take five times its bytes
        return bool(torch.isfinite(values[piece].to(torch.float32)).all())

    return all(for_pieces(finite, values.numel(), 1))


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raise SwquantError for NaN or infinity."""
    if not _all_finite(weight):
        raise SwquantError(f"{name}: holds a NaN or infinite value; the source is damaged, fetch it again")


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor as it is stored."""
    cast = weight.to(dtype)
    if dtype is not weight.dtype and not _all_finite(cast):
        kind = str(dtype).removeprefix("torch.")
        raise SwquantError(f"{name}: a value of {weight.abs().max():.3g} does not fit {kind}; use --dtype bfloat16")
    return cast


def round_weight(
    weight: torch.Tensor, tensor: TensorPlan, options: CompressOptions, importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """Round one weight as planned; blocks that hold a super weight keep their extreme."""
    assert tensor.block is not None
    scale_dtype = tensor.layout[f"{tensor.module}.weight_scale"][0]
    keep_extreme = None
    if tensor.super_weights:
        rows, cols = coordinates(tensor)
        count = tensor.source.numel // block_elements(tensor.block, tensor.shape)
        keep_extreme = torch.zeros(count, dtype=torch.bool)
        keep_extreme[block_index(rows, cols, tensor.block, tensor.shape)] = True
    try:
        return quantize(
            weight,
            tensor.block,
            tensor.bits,
            symmetric=options.symmetric,
            clip=options.parsed_clip,
            importance=importance,
            keep_extreme=keep_extreme,
            scale_dtype=scale_dtype,
        )
    except ValueError as error:
        check_finite(tensor.name, weight)
        raise SwquantError(f"{tensor.name}: {error}; use --dtype bfloat16") from None


def choose_outliers(
    weight: torch.Tensor, quantized: QuantizedTensor, tensor: TensorPlan, importance: torch.Tensor | None = None
) -> Outliers:
    """The points of a tensor's sidecar: its super weights, and as many of the worst rounded as were planned."""
    return worst(weight, quantized, tensor.points, always=tensor.super_weights, importance=importance)


def coordinates(tensor: TensorPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of a tensor's super weights."""
    rows, cols = torch.tensor(tensor.super_weights, dtype=torch.int64).T
    return rows, cols
