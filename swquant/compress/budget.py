"""Bits per tensor under a budget, without data: which weights hurt the model's predictions most when rounded.

The model writes a few short texts and reads them again once for every group of weights, with that group alone rounded
to a few bits; what this does to the predictions (KL divergence, mean over the tokens) is the group's sensitivity. One
bit more makes the squared error of rounding a quarter, so the loss at other numbers of bits follows, and
`calibrationless.allocate` shares the budget out. The ten tokens of the one prompt are too few for this: what they feel
most is the first of them. Loaders fuse weights that read the same input and want one scheme for them (q/k/v, gate/up,
all experts): those are a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calibrationless import MAX_BITS, MIN_BITS, allocate, dequantize, fit, follow, restore, shape_of
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import begins_with
from swquant.compress.evidence import evidence_for
from swquant.compress.loaders import fused_layer
from swquant.compress.options import CompressOptions
from swquant.compress.plan import Plan, TensorPlan
from swquant.detect.found import Found
from swquant.detect.pipeline import probed_model, run_text, watchable
from swquant.detect.texts import write_text
from swquant.models.architecture import LinearKind
from swquant.progress import Progress

__all__ = ["bits_within", "sensitivities"]

Plans = Callable[[Mapping[str, int]], Plan]
# Bits that a group is rounded to while its sensitivity is measured: enough to be felt, near what a small budget gives.
_PROBED_BITS = 3
TEXTS, LENGTH = 6, 64


def bits_within(
    checkpoint: Checkpoint,
    found: Found,
    options: CompressOptions,
    plan_with: Plans,
    *,
    low_memory: bool,
    progress: Progress,
) -> dict[str, int]:
    """Bits of every quantized linear weight, so that all of them together take at most options.bits_budget per weight.

    plan_with: the plan for given bits. Raises SwquantError where not even the fewest bits fit.
    """
    assert options.bits_budget is not None
    choices = range(MIN_BITS, MAX_BITS + 1)
    plans = {bits: plan_with(dict.fromkeys(found.architecture.weights, bits)) for bits in choices}
    weights = sum(tensor.source.numel for tensor in plans[MIN_BITS].linear)
    groups = fused_groups(found, [tensor.name for tensor in plans[MIN_BITS].linear])
    probed = {tensor.name: tensor for tensor in plans[_PROBED_BITS].linear}
    stored = {
        bits: {tensor.name: tensor.nbytes + tensor.sidecar_bytes for tensor in plan.linear}
        for bits, plan in plans.items()
    }
    sizes = [[sum(stored[bits][name] for name in group) for bits in choices] for group in groups]
    smallest, largest = (8 * sum(size[index] for size in sizes) / weights for index in (0, -1))
    if not smallest <= options.bits_budget <= largest:
        raise SwquantError(
            f"a budget of {options.bits_budget:g} bits per weight is outside {smallest:.2f} to {largest:.2f}, what {MIN_BITS} and "
            f"{MAX_BITS} bits take with block {options.block_name} and {options.outlier_fraction:g} outliers"
        )
    tried = [[probed[name] for name in group] for group in groups]
    felt = sensitivities(checkpoint, found, options, tried, low_memory=low_memory, progress=progress)
    losses = [[loss * 4.0 ** (_PROBED_BITS - bits) for bits in choices] for loss in felt]
    chosen = allocate(sizes, losses, options.bits_budget * weights / 8)
    return {name: choices[index] for group, index in zip(groups, chosen, strict=True) for name in group}


def fused_groups(found: Found, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names, those together that must have equal bits: weights that read the same norm, those that vLLM fuses (of a
    post-norm model, whose layers read no norm), and all experts."""
    groups: dict[str, list[str]] = {}
    for name in names:
        weight, record = found.architecture.weights[name], found.record(name)
        norm = record.norm if record is not None else ""
        groups.setdefault("experts" if weight.kind is LinearKind.EXPERT else norm or fused_layer(name), []).append(name)
    return [tuple(group) for group in groups.values()]


def sensitivities(
    checkpoint: Checkpoint,
    found: Found,
    options: CompressOptions,
    groups: Sequence[Sequence[TensorPlan]],
    *,
    low_memory: bool,
    progress: Progress,
) -> list[float]:
    """KL divergence of the predictions, in nats per token, with each group alone rounded as it is planned."""
    felt = []
    with probed_model(checkpoint, low_memory) as model, watchable(model):
        tokens = write_text(model, begins_with(checkpoint), options.seed, progress, texts=TEXTS, length=LENGTH)

        def predict(group: Sequence[TensorPlan]) -> Tensor:
            """Log-probabilities, float32 [tokens, vocabulary]."""
            replace = {
                found.architecture.weights[tensor.name].watch: partial(_rounded, tensor, found, options)
                for tensor in group
            }
            logits = run_text(model, found.architecture, tokens, replace=replace, record=False).logits
            return logits.flatten(0, -2).log_softmax(dim=-1)

        original = predict(())
        likely = original.exp()
        with progress.tokens("Weighing tensors", len(groups) * tokens.numel()) as bar:
            for group in groups:
                divergence = (original - predict(group)).mul_(likely).sum(dim=-1, dtype=torch.float64)
                felt.append(float(divergence.mean().clamp(min=0)))
                bar.advance(group[0].name, tokens.numel())
    return felt


def _rounded(tensor: TensorPlan, found: Found, options: CompressOptions, weight: Tensor) -> Tensor:
    """A watched weight [out, in] as `compress` would round the planned tensor, but for scaled channels.

    Experts that share their input (gate and up) are watched as one weight, its block and outliers of its own shape.
    """
    assert tensor.recipe is not None
    block = fit(tensor.recipe.block, shape_of(weight))
    if block is None:
        return weight
    outliers = tensor.recipe.outliers * weight.numel() // tensor.source.numel
    evidence = evidence_for(replace(tensor, fold=None), found, options.refinement, None)
    rounded = follow(replace(tensor.recipe, block=block, outliers=outliers), weight, evidence)
    return restore(dequantize(rounded.quantized, torch.float32), *rounded.patches.values())
