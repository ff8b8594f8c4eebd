"""Experiment 3: the super activation persists (the paper's Figure 4).

The largest value of its channel of the residual stream after every layer, with and without the super weights that make
it, on prompts in several languages: is it always there, in the same channel, at the same token?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from calibrationless import Scalar, SuperActivation, run_probe
from exporters.errors import SwquantError
from swquant.detect.pipeline import prompt_tokens, watchable
from swquant.drawing.section import Chart, Section, Series, Table, number
from swquant.study.changes import Change
from swquant.study.measuring import Measured
from swquant.study.subject import Subject

__all__ = ["PROMPTS", "changes", "conclude"]

PAPER = (
    "The super activation keeps its magnitude through the layers, in the same channel and at the same position whatever the "
    "prompt; pruning the super weight takes about 75 % of it away (Figure 4)."
)
PROMPTS: tuple[tuple[str, str], ...] = (
    ("English", "The museum opens at nine and closes before dark."),
    ("the same, later", "It is well known that the museum opens at nine and closes before dark."),
    ("German", "Der Zug nach Wien fährt heute von Gleis sieben."),
    ("French", "Ma grand-mère cultive des tomates derrière la maison."),
    ("Spanish", "Mañana iremos al mercado a comprar pan y queso."),
    ("Polish", "Wczoraj wieczorem padał śnieg i było bardzo zimno."),
    ("Russian", "Вчера вечером мы долго гуляли по берегу реки."),
    ("Arabic", "يقرأ الطالب كتابا في المكتبة كل صباح."),
    ("Hindi", "आज मौसम बहुत अच्छा है और बच्चे बाहर खेल रहे हैं।"),
    ("Chinese", "今天天气很好，我们去公园散步吧。"),
    ("Japanese", "昨日は友達と一緒に映画を見に行きました。"),
    ("Python", "def area(radius):\n    return 3.14159 * radius ** 2\n"),
    ("C", "for (int i = 0; i < n; i++) { total += values[i]; }"),
    ("numbers", "12 + 30 = 42, 7 * 8 = 56, 81 / 9 = 9"),
)
# Of the largest value on the default prompt: what counts as being there.
PRESENT = 0.5


@dataclass(frozen=True)
class _Run:
    """One prompt. with_, without: float [layers + 1], |value| of the channel entering layer 0 and after each layer.

    lives: the part of it in which the super activation is there. (Later layers that take it away write its mirror image
    when it is missing.)
    """

    label: str
    position: int
    token: str
    tokens: int
    with_: tuple[float, ...]
    without: tuple[float, ...]
    lives: slice

    @property
    def peak(self) -> float:
        return max(self.with_[self.lives])

    @property
    def pruned_peak(self) -> float:
        return max(self.without[self.lives])


def changes(subject: Subject) -> tuple[Change, ...]:
    """None: probes of short prompts show it."""
    return ()


def conclude(subject: Subject, measured: Measured) -> Section:
    """Magnitudes by layer over all prompts, position and magnitude for each."""
    title = "The super activation persists"
    activations = subject.found.detection.super_activations
    if not activations:
        return Section("persistence", title, PAPER, "Not shown: this model has no super activation on the prompt.")
    activation = max(activations, key=lambda item: abs(item.value))
    runs = _runs(subject, activation, measured)
    finding, agrees = _finding(activation, runs)
    return Section(
        name="persistence",
        title=title,
        paper=PAPER,
        finding=finding,
        agrees=agrees,
        charts=(_chart(activation, runs),),
        tables=(_prompts(runs), _layers(activation, runs)),
    )


def _encoded(subject: Subject) -> list[tuple[str, tuple[int, ...]]]:
    encoded = [("detection prompt", subject.found.token_ids)]
    for label, text in PROMPTS if not subject.quick else PROMPTS[::3]:
        try:
            encoded.append((label, prompt_tokens(subject.checkpoint, text)))
        except SwquantError:  # a tokenizer that knows nothing of it
            continue
    return encoded


def _runs(subject: Subject, activation: SuperActivation, measured: Measured) -> list[_Run]:
    encoded = _encoded(subject)
    pruned = [weight.scalar for weight in subject.super_weights if weight.row == activation.channel]
    key = f"persistence of channel {activation.channel} on {encoded} without {pruned}"

    def observe() -> dict[str, Tensor]:
        with watchable(subject.model):
            probes = [_probe(subject, activation.channel, ids, pruned) for _, ids in encoded]
        return {
            "with": torch.stack([probe[0] for probe in probes]),
            "without": torch.stack([probe[1] for probe in probes]),
            "positions": torch.tensor([probe[2] for probe in probes]),
        }

    tensors = measured.remember(key, observe)
    tokenizer = subject.checkpoint.tokenizer()
    lives = slice(activation.born + 1, None if activation.gone is None else activation.gone + 1)
    positions = tensors["positions"].tolist()
    return [
        _Run(label, position, str(tokenizer.decode([ids[position]])), len(ids), tuple(with_), tuple(without), lives)
        for (label, ids), position, with_, without in zip(
            encoded, positions, tensors["with"].tolist(), tensors["without"].tolist(), strict=True
        )
    ]


def _probe(subject: Subject, channel: int, ids: Sequence[int], pruned: Sequence[Scalar]) -> tuple[Tensor, Tensor, int]:
    """(magnitudes float64 [layers + 1] with, the same without the super weights, position of the largest value)."""
    watches = [subject.watch(name) for name in sorted({scalar.name for scalar in pruned})]
    layers = subject.found.architecture.layers
    tokens = torch.tensor([ids], device=subject.model.device)

    def forward() -> Tensor:
        return subject.model(input_ids=tokens, use_cache=False).logits[0]

    full, without = (run_probe(subject.model, forward, watches, layers, prune=prune) for prune in ((), pruned))
    values = torch.tensor([float(state.values[channel]) for state in full.residual], dtype=torch.float64).abs()
    rest = torch.tensor([float(state.values[channel]) for state in without.residual], dtype=torch.float64).abs()
    top = full.residual[int(values.argmax())]
    return values, rest, int(top.tokens[channel])


def _finding(activation: SuperActivation, runs: Sequence[_Run]) -> tuple[str, bool]:
    last = "the end" if activation.gone is None else f"layer {activation.gone}"
    top = abs(activation.value)
    there = [run for run in runs if run.peak >= PRESENT * top]
    usual = runs[0].position
    same = [run for run in there if run.position == usual]
    cut = median(1 - run.pruned_peak / run.peak for run in runs if run.peak > 0)
    stays = runs[0].with_[runs[0].lives]
    agrees = len(same) >= 0.75 * len(runs) and len(stays) > 1
    text = (
        f"Channel {activation.channel} holds {number(top)} from layer {activation.born} to {last}, through {len(stays)} layers "
        f"at no less than {min(stays) / max(stays):.0%} of its largest value. It is there on {len(there)} of {len(runs)} prompts, "
        f"on {len(same)} of them at position {usual} like on the first. Without the super weights its largest value is {cut:.0%} "
        f"lower (median over the prompts)."
    )
    if not agrees:
        text += " So here it does depend on the prompt, unlike in the paper."
    return text, agrees


def _chart(activation: SuperActivation, runs: Sequence[_Run]) -> Chart:
    depth = len(runs[0].with_)
    x = tuple(float(layer) for layer in range(depth))

    def band(label: str, values: Sequence[tuple[float, ...]]) -> Series:
        columns = list(zip(*values, strict=True))
        return Series(
            label, x, tuple(map(median, columns)), tuple(map(min, columns)), tuple(map(max, columns))
        )  # fmt: skip

    return Chart(
        name="persistence",
        title=f"Channel {activation.channel} of the residual stream",
        alt=(
            f"Magnitude of channel {activation.channel} before the first and after every layer, with and without the super "
            f"weights: median over {len(runs)} prompts, band from the smallest to the largest."
        ),
        xlabel="after layer (0: embedding)",
        ylabel="largest |value|",
        series=(
            band("original", [run.with_ for run in runs]),
            band("super weights pruned", [run.without for run in runs]),
        ),
        ylog=True,
    )


def _prompts(runs: Sequence[_Run]) -> Table:
    return Table(
        "prompts",
        "Where the largest value of the channel is, and how large it is with and without the super weights.",
        ("prompt", "tokens", "position", "token", "original", "super weights pruned"),
        tuple((run.label, run.tokens, run.position, repr(run.token), run.peak, run.pruned_peak) for run in runs),
    )


def _layers(activation: SuperActivation, runs: Sequence[_Run]) -> Table:
    return Table(
        "persistence",
        f"Largest |value| of channel {activation.channel} after every layer, median over the prompts (0: the embedding).",
        ("after layer", "original", "super weights pruned"),
        tuple(
            (layer, median(run.with_[layer] for run in runs), median(run.without[layer] for run in runs))
            for layer in range(len(runs[0].with_))
        ),
    )
