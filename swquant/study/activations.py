"""Experiment 7: the inputs of all linear layers in INT8 (the paper's Table 3).

One scale for a tensor, or for each token of it, and what is massive rounded like the rest, or kept: the paper's one
scalar, or the fixed channels that `compress --activations int8` keeps. Weights stay as they are, so that the loss is
that of the activations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calibrationless import massive_channels, round_activations
from swquant.drawing.section import Bars, Cell, Section, Table
from swquant.models.architecture import LinearKind
from swquant.study import bootstrap
from swquant.study.changes import Change, original
from swquant.study.measuring import Measured
from swquant.study.subject import Subject

__all__ = ["changes", "conclude"]

PAPER = (
    "Rounding activations to INT8 with one scale costs Llama-7B 0.15 of its perplexity of 5.68; replacing the one super "
    "activation before rounding and restoring it after takes most of that away, about as much as SmoothQuant with data (Table 3)."
)
SCALES = {"per tensor": False, "per token": True}
KEPT = {
    "nothing": "the super activation is rounded like the rest",
    "scalar": "the largest value under each scale is replaced and restored, as in the paper",
    "channels": "fixed channels of each layer, found on the one prompt, as compress does it",
}


def _keep(kept: str, inputs: Tensor, channels: Tensor, per_token: bool) -> Tensor | None:
    """bool, broadcast over inputs [..., in]: what is replaced before rounding."""
    if kept == "channels":
        return channels.to(inputs.device) if bool(channels.any()) else None
    if kept == "nothing":
        return None
    magnitudes = inputs.abs()
    largest = magnitudes.amax(dim=-1, keepdim=True) if per_token else magnitudes.amax()
    return magnitudes == largest


def inputs_rounded(scale: str, kept: str) -> Change:
    """The input of every linear layer rounded to int8; `scale` of `SCALES`, `kept` of `KEPT`."""
    per_token = SCALES[scale]

    def rounded(channels: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0]
        return (round_activations(inputs, _keep(kept, inputs, channels, per_token), per_token=per_token), *args[1:])

    @contextmanager
    def apply(subject: Subject) -> Iterator[None]:
        with ExitStack() as stack:
            for module, channels in _massive(subject).items():
                hook: Callable[..., Any] = partial(rounded, channels)
                stack.callback(subject.model.get_submodule(module).register_forward_pre_hook(hook).remove)
            yield

    label = f"INT8 inputs, one scale {scale}, {kept} kept"
    return Change(label, label, apply)


def _massive(subject: Subject) -> dict[str, Tensor]:
    """Module of a linear layer -> bool [in]: its massive channels. Experts are not modules that could be watched."""
    channels: dict[str, Tensor] = {}
    for name, linear in subject.found.architecture.weights.items():
        record = subject.found.record(name)
        if record is not None and linear.kind not in (LinearKind.EXPERT, LinearKind.FUSED):
            channels[linear.module] = torch.zeros(len(record.peaks), dtype=torch.bool)
            channels[linear.module][massive_channels(record.peaks).long()] = True
    return channels


def changes(subject: Subject) -> tuple[Change, ...]:
    """The rows of the table, in its order."""
    return (original(), *(inputs_rounded(scale, kept) for scale in SCALES for kept in KEPT))


def conclude(subject: Subject, measured: Measured) -> Section:
    """Perplexity, KL divergence and agreement of every row, with intervals."""
    scores = {(scale, kept): measured[inputs_rounded(scale, kept)] for scale in SCALES for kept in KEPT}
    base = measured[original()]
    rows: list[tuple[Cell, ...]] = [("original", "", bootstrap.perplexity(base), None, None)]
    rows += [
        (scale, kept, bootstrap.perplexity(item), bootstrap.divergence(item), bootstrap.agreement(item))
        for (scale, kept), item in scores.items()
    ]
    plain, scalar, fixed = (scores["per tensor", kept] for kept in KEPT)
    gain = bootstrap.excess_divergence(scalar, plain)
    agrees = None if not subject.super_weights or gain.high is None else gain.high < 0
    layers = [bool(channels.any()) for channels in _massive(subject).values()]
    by_token = " and ".join(
        f"{bootstrap.divergence(scores['per token', kept])} with {kept} kept" for kept in ("nothing", "channels")
    )
    finding = (
        f"{sum(layers)} of {len(layers)} linear layers have inputs with massive channels. With one scale per tensor the KL "
        f"divergence from the original is {bootstrap.divergence(plain)} nats per token; keeping the one largest scalar makes it "
        f"{bootstrap.divergence(scalar)}, keeping fixed channels {bootstrap.divergence(fixed)}. With one scale per token it is {by_token}."
    )
    if agrees is False:
        finding += " Keeping one scalar does not help beyond noise, unlike in the paper."
    return Section(
        name="activations",
        title="Activations in INT8",
        paper=PAPER,
        finding=finding,
        agrees=agrees,
        charts=(
            Bars(
                "activations",
                "KL divergence with INT8 activations, by what is kept",
                "KL divergence from the original, logarithmic, for nothing, one scalar and fixed channels kept, with one scale per "
                "tensor and per token; exact values in the table.",
                "KL divergence, nats per token (95 % interval)",
                tuple(f"{kept} kept" for kept in KEPT),
                tuple(SCALES),
                tuple(tuple(bootstrap.divergence(scores[scale, kept]) for kept in KEPT) for scale in SCALES),
                xlog=True,
            ),
        ),
        tables=(
            Table(
                "activations",
                "Weights as they are. " + "; ".join(f"{kept}: {meaning}" for kept, meaning in KEPT.items()) + ".",
                ("scale", "kept", "perplexity", "KL divergence", "agreement"),
                tuple(rows),
            ),
        ),
    )
