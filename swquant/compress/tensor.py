"""One tensor: from its plan, its weight and what is known of its inputs to what is written of it.

`round_tensor` is a pure function and its result a value: no file, no model, no progress bar. Another process, or
another machine, can be given the three and gives back the same bytes; the writer is the only one that knows files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from calibrationless import CPU, Evidence, Patch, Rounded, WeightError, dequantize, follow, moved
from exporters import layouts
from exporters.errors import SwquantError
from swquant.checkpoints.schema import UNUSED
from swquant.checkpoints.stored import all_finite
from swquant.compress.plan import TensorPlan
from swquant.detect.folds import fold_columns, fold_gain

__all__ = ["RoundedTensor", "SuperWeightCode", "round_tensor"]


@dataclass(frozen=True)
class SuperWeightCode:
    """A super weight, and what a loader sees that does not know the sidecar: the safety rule, in numbers."""

    row: int
    col: int
    value: float
    without_sidecar: float


@dataclass(frozen=True)
class RoundedTensor:
    """What is written of one tensor.

    parts: stored name -> tensor, as the plan's layout announces them (the weight itself of a dense one). patches: set
    -> what the sidecar holds. error: what rounding cost, None for a dense tensor.
    """

    name: str
    parts: Mapping[str, torch.Tensor]
    patches: Mapping[str, Patch]
    error: WeightError | None = None
    super_weights: tuple[SuperWeightCode, ...] = ()


def round_tensor(
    plan: TensorPlan, weight: torch.Tensor, evidence: Evidence, device: torch.device = CPU
) -> RoundedTensor:
    """Carry out the plan of one tensor. device: where it is rounded; the result is on the CPU. Raises SwquantError for
    NaN, infinity, and values that a dtype cannot hold."""
    if plan.recipe is None:
        return _dense(plan, weight)
    if plan.fold is not None:
        weight = fold_columns(weight, plan.fold)
    try:
        rounded = moved(follow(plan.recipe, weight.to(device), moved(evidence, device)), CPU)
    except ValueError as error:
        _check_finite(plan.name, weight)
        raise SwquantError(f"{plan.name}: {error}; use --dtype bfloat16") from None
    local = layouts.to_tensors(rounded.quantized, int8_inputs=plan.int8_inputs)
    return RoundedTensor(
        name=plan.name,
        parts={f"{plan.module}.{key}": part for key, part in local.items()},
        patches=rounded.patches,
        error=rounded.error,
        super_weights=_codes(plan, weight, rounded),
    )


def _codes(plan: TensorPlan, weight: torch.Tensor, rounded: Rounded) -> tuple[SuperWeightCode, ...]:
    if not plan.super_weights:
        return ()
    decoded = dequantize(rounded.quantized, torch.float32)
    return tuple(
        SuperWeightCode(row, col, float(weight[row, col]), float(decoded[row, col])) for row, col in plan.super_weights
    )


def _dense(plan: TensorPlan, weight: torch.Tensor) -> RoundedTensor:
    ((name, (dtype, _)),) = plan.layout.items()
    if plan.reason == UNUSED:  # it may hold anything: the causal mask of an old GPT-NeoX in half is -inf
        return RoundedTensor(plan.name, {name: weight.to(dtype)}, {})
    _check_finite(plan.name, weight)
    if plan.fold is not None:
        weight = fold_gain(weight, plan.fold, is_bias=plan.name == plan.fold.bias)
    cast = weight.to(dtype)
    if dtype is not weight.dtype and not all_finite(cast):
        kind = str(dtype).removeprefix("torch.")
        raise SwquantError(f"{name}: a value of {weight.abs().max():.3g} does not fit {kind}; use --dtype bfloat16")
    return RoundedTensor(plan.name, {name: cast}, {})


def _check_finite(name: str, weight: torch.Tensor) -> None:
    if not all_finite(weight):
        raise SwquantError(f"{name}: holds a NaN or infinite value; the source is damaged, fetch it again")
