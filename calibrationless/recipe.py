"""The recipe: how one weight is rounded, from the search of its scales to what the result costs.

    search or clip -> round -> keep the worst exactly -> feed errors back -> measure

`compress` writes what this gives, the bits budget weighs tensors by it, the study repeats the paper's experiments with
it, and all of them mean the same by the same words. A recipe says how, `Evidence` says what is known of the weight's
inputs; the result is a value that depends on these and the weight alone, so it can be made in any process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.affine import quantize_affine
from calibrationless.blocks import Block, block_elements, block_index, shape_of
from calibrationless.clipping import Clip
from calibrationless.cost import WeightError, measure, worst
from calibrationless.feedback import Factor, feed_back
from calibrationless.patches import Patch, Points
from calibrationless.quantized import QuantizedTensor
from calibrationless.rounding import quantize
from calibrationless.super_blocks import quantize_super_blocks

__all__ = ["Evidence", "Recipe", "Rounded", "follow"]


@dataclass(frozen=True)
class Recipe:
    """How a [out, in] weight is rounded.

    offsets: none, or how the real offsets of `affine` are stored: float (in scale_dtype, like the scales) or byte;
    super for what GGUF's k-quants have, where the bits say the block and whether there are offsets at all.
    scale_dtype: what scales are stored in.
    super_weights: (row, col) of those that detection found. outliers: how many weights a patch keeps exactly, super
    weights included (0: no patch).
    hold_out: round as if the super weights were zero (the paper's order of things), instead of letting their blocks
    represent them; only right where the patch is never left out.
    """

    block: Block
    bits: int
    symmetric: bool = True
    offsets: str = "none"
    clip: Clip | None = None
    scale_dtype: torch.dtype | None = None
    super_weights: tuple[tuple[int, int], ...] = ()
    outliers: int = 0
    hold_out: bool = False


@dataclass(frozen=True)
class Evidence:
    """What is known of the inputs of a weight.

    importance: float [in], how much an error on each input channel matters; scales are searched and outliers chosen
    with it (None: plain rounding). energy: float [in], what the error of the output is measured with (None: not
    measured). factor: of the Gram matrix of the inputs, for error feedback (None: no feedback).
    """

    importance: Tensor | None = None
    energy: Tensor | None = None
    factor: Factor | None = None


@dataclass(frozen=True)
class Rounded:
    """A rounded weight, the patches by the name of their set, and what rounding cost with them laid over."""

    quantized: QuantizedTensor
    patches: dict[str, Patch]
    error: WeightError


def follow(recipe: Recipe, weight: Tensor, evidence: Evidence = Evidence()) -> Rounded:
    """Round a [out, in] weight. Raises ValueError for NaN, infinity, and scales that their dtype cannot hold."""
    quantized = _quantized(recipe, weight, evidence.importance)
    patches = _patches(recipe, weight, quantized, evidence.importance)
    if evidence.factor is not None:
        held = tuple(patches.values())
        if recipe.super_weights and not recipe.outliers:
            # Without a patch, too, a super weight keeps its own code: its block is all that represents it.
            held = (*held, Points.at(weight, *_places(recipe)))
        quantized = feed_back(weight, quantized, evidence.factor, *held)
    error = measure(weight, quantized, *patches.values(), importance=evidence.energy)
    return Rounded(quantized, patches, error)


def _quantized(recipe: Recipe, weight: Tensor, importance: Tensor | None) -> QuantizedTensor:
    part, keep = _without_super_weights(recipe, weight), _blocks_of_super_weights(recipe, weight)
    block, bits, dtype = recipe.block, recipe.bits, recipe.scale_dtype
    if recipe.offsets == "super":
        return quantize_super_blocks(
            part, bits, importance=importance, super_weights=() if keep is None else recipe.super_weights
        )
    if recipe.offsets != "none":
        storage = (dtype or weight.dtype) if recipe.offsets == "float" else None
        return quantize_affine(part, block, bits, importance=importance, keep_extreme=keep, storage=storage)
    return quantize(
        part,
        block,
        bits,
        symmetric=recipe.symmetric,
        clip=recipe.clip,
        importance=importance,
        keep_extreme=keep,
        scale_dtype=dtype,
    )


def _places(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """int64 rows and columns of the super weights."""
    rows, cols = torch.tensor(recipe.super_weights, dtype=torch.int64).T
    return rows, cols


def _without_super_weights(recipe: Recipe, weight: Tensor) -> Tensor:
    if not (recipe.hold_out and recipe.super_weights):
        return weight
    held = weight.clone()
    held[_places(recipe)] = 0.0
    return held


def _blocks_of_super_weights(recipe: Recipe, weight: Tensor) -> Tensor | None:
    """bool [blocks], those that keep their extreme; None where none has to."""
    if recipe.hold_out or not recipe.super_weights:
        return None
    shape = shape_of(weight)
    keep = torch.zeros(weight.numel() // block_elements(recipe.block, shape), dtype=torch.bool, device=weight.device)
    keep[block_index(*_places(recipe), recipe.block, shape)] = True
    return keep


def _patches(recipe: Recipe, weight: Tensor, quantized: QuantizedTensor, importance: Tensor | None) -> dict[str, Patch]:
    """Set -> patch, in the order in which they are laid over the weight."""
    if not recipe.outliers:
        return {}
    kept = worst(weight, quantized, recipe.outliers, always=recipe.super_weights, importance=importance)
    return {"outliers": kept}
