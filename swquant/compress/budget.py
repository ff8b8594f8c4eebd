"""Bits per tensor under a budget, without data: which weights hurt the model's own predictions most when they are rounded.

The model writes a few short texts and reads them again once for every group of weights, with that group alone rounded to a
few bits; what this does to the predictions (KL divergence, mean over the tokens) is the group's sensitivity. One bit more
makes the squared error of rounding a quarter, so the loss at other numbers of bits follows, and `calibrationless.allocate`
shares the budget out. The ten tokens of the one prompt are too few for this: what they feel most is the first of them.
Loaders fuse weights that read the same input and want one scheme for them (q/k/v, gate/up, all experts): those are a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from calibrationless import MAX_BITS, MIN_BITS, allocate, dequantize, fit, quantize, restore, worst
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.compress.options import CompressOptions
from swquant.compress.plan import Plan
from swquant.detect.found import Found
from swquant.detect.own_text import start_token, write_text
from swquant.detect.pipeline import probed_model, run_text, watchable
from swquant.progress import Progress

__all__ = ["bits_within", "sensitivities"]

Plans = Callable[[Mapping[str, int]], Plan]
# Bits that a group is rounded to while its sensitivity is measured: enough to be felt, and near to what a small budget gives.
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
    """Bits of every quantized tensor, so that all of them together take at most options.bits_budget per weight.

    plan_with: the plan for given bits. Raises SwquantError where not even the fewest bits fit.
    """
    assert options.bits_budget is not None
    choices = range(MIN_BITS, MAX_BITS + 1)
    plans = {bits: plan_with(dict.fromkeys(found.architecture.weights, bits)) for bits in choices}
    weights = sum(tensor.source.numel for tensor in plans[MIN_BITS].quantized)
    groups = fused_groups(found, [tensor.name for tensor in plans[MIN_BITS].quantized])
    stored = {
        bits: {tensor.name: tensor.nbytes + tensor.sidecar_bytes for tensor in plan.quantized}
        for bits, plan in plans.items()
    }
    sizes = [[sum(stored[bits][name] for name in group) for bits in choices] for group in groups]
    smallest, largest = (8 * sum(size[index] for size in sizes) / weights for index in (0, -1))
    if not smallest <= options.bits_budget <= largest:
        raise SwquantError(
            f"a budget of {options.bits_budget:g} bits per weight is outside {smallest:.2f} to {largest:.2f}, what {MIN_BITS} and "
            f"{MAX_BITS} bits take with block {options.block} and {options.outlier_fraction:g} outliers"
        )
    felt = sensitivities(checkpoint, found, options, groups, low_memory=low_memory, progress=progress)
    losses = [[loss * 4.0 ** (_PROBED_BITS - bits) for bits in choices] for loss in felt]
    chosen = allocate(sizes, losses, options.bits_budget * weights / 8)
    return {name: choices[index] for group, index in zip(groups, chosen, strict=True) for name in group}


def fused_groups(found: Found, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names, those together that must have equal bits: weights that read the same norm, and all experts."""
    groups: dict[str, list[str]] = {}
    for name in names:
        weight, record = found.architecture.weights[name], found.record(name)
        norm = record.norm if record is not None else ""
        groups.setdefault("experts" if weight.kind == "expert" else norm or name, []).append(name)
    return [tuple(group) for group in groups.values()]


def sensitivities(
    checkpoint: Checkpoint,
    found: Found,
    options: CompressOptions,
    groups: Sequence[Sequence[str]],
    *,
    low_memory: bool,
    progress: Progress,
) -> list[float]:
    """KL divergence of the predictions, in nats per token, with each group alone rounded to three bits."""
    rounded = partial(_rounded, found, options)
    felt = []
    with probed_model(checkpoint, low_memory) as model, watchable(model):
        tokens = write_text(model, start_token(checkpoint, found), options.seed, progress, texts=TEXTS, length=LENGTH)

        def predict(group: Sequence[str]) -> Tensor:
            """Log-probabilities, float32 [tokens, vocabulary]."""
            watches = [found.architecture.weights[name].watch for name in group]
            replace = {watch: partial(rounded, watch) for watch in watches}
            logits = run_text(model, found.architecture, tokens, replace=replace, record=False).logits
            return logits.flatten(0, -2).log_softmax(dim=-1)

        original = predict(())
        likely = original.exp()
        with progress.tokens("Weighing tensors", len(groups) * tokens.numel()) as bar:
            for group in groups:
                divergence = (original - predict(group)).mul_(likely).sum(dim=-1, dtype=torch.float64)
                felt.append(float(divergence.mean().clamp(min=0)))
                bar.advance(group[0], tokens.numel())
    return felt


def _rounded(found: Found, options: CompressOptions, watch: str, weight: Tensor) -> Tensor:
    """A watched weight [out, in] as `compress` would round it, but for scaled channels: search and outliers included."""
    block = fit(options.parsed_block, (weight.shape[0], weight.shape[1]))
    if block is None:
        return weight
    probe = found.detection.probe
    record = probe.linears.get(watch) if probe is not None and options.refinement != "none" else None
    energy = record.energy if record is not None else None
    always = (
        [(item.row, item.col) for item in found.detection.super_weights if item.name == watch]
        if options.restore
        else []
    )
    quantized = quantize(
        weight, block, _PROBED_BITS, symmetric=options.symmetric, clip=options.parsed_clip, importance=energy
    )
    kept = worst(
        weight,
        quantized,
        len(always) + int(options.outlier_fraction * weight.numel()),
        always=always,
        importance=energy,
    )
    return restore(dequantize(quantized, torch.float32), kept)
