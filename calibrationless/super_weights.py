"""Detection: from what one prompt showed to a list of super weights, with the evidence for each.

A super weight writes one enormous value, the *super activation*, into one channel of the residual
stream at one token, where it stays for many layers. Every threshold below is relative, because
magnitudes differ by a factor of a thousand between models (SmolLM2: 24,000; Gemma: 3,000; OLMo: 40):

    spike         the largest output of a layer's down projection is at least 20 times the median
                  of its token, and so is the input behind it; the largest outputs of other rows
                  count, too, if they are at least a quarter of it
    written       the residual stream changes at that channel by at least a fifth of what it
                  then holds (layers may share the work), and by a tenth of the most that it ever holds
    stands out    the new value is at least 20 times the median of its token
    stays         at that token it keeps its sign and a third of its size, or stands out still, for a
                  quarter of the layers that follow (at least one)
    share         single terms x[col] * W[row, col] that make at least 10 % of the output

A channel is followed token by token, because a super weight may fire at several. At a token that does not
hold the channel's largest value, the change must be at least three times that of the median token, too: what
attention writes to all tokens alike is no spike.

What passes is a *creator*, if the channel held less than a quarter of the value before; an *amplifier* if
it held more. Lesser terms of the same output are *companions*. Terms that take the value away again in
a late layer are *cancellers*: their outputs spike just as high, which is what fools a fixed threshold,
and pruning them hardly matters.

Then the found weights are left out and the prompt runs again, until no new spike appears: a second super
weight can hide behind the first. What appears then in a known channel must have the sign known: the layers
that used to cancel a super activation now write its mirror image. What appears in another channel was in the
base pass already: the residual stream held at least half of it at the same place. Last, each weight is left
out alone and the change of the model's predictions is its score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrationless.records import LinearRecord, Probe, Scalar, Spike

__all__ = ["Detection", "LayerSpike", "SuperActivation", "SuperWeight", "detect"]

SPIKE = 20.0
WRITTEN = 0.2
OF_CHANNEL = 0.1
KEPT = 1 / 3
STAYS = 0.25
ALONE = 3.0
SHARE = 0.1
NEW = 0.25
HELD = 0.5
OF_PROJECTION = 0.25
ROUNDS = 8


@dataclass(frozen=True)
class SuperWeight:
    """One scalar and why it is on the list.

    name, row, col: the weight `name`[row = output channel, col = input channel], `value` its value.
    role: creator, companion, amplifier or canceller.
    input, output: the activation x[col] that meets it and the output y[row] that it dominates.
    share: part of y[row] that is x[col] * value. residual: what channel `row` then holds.
    kl: mean KL divergence, in nats, of the predictions on the prompt when it is left out.
    loss: change of the mean cross entropy of the prompt's own tokens, in nats.
    """

    name: str
    layer: int
    row: int
    col: int
    value: float
    role: str
    token: int
    input: float
    output: float
    share: float
    residual: float
    kl: float = 0.0
    loss: float = 0.0

    @property
    def scalar(self) -> Scalar:
        return Scalar(self.name, self.row, self.col)


@dataclass(frozen=True)
class SuperActivation:
    """A channel of the residual stream that holds one enormous value.

    born, gone: the layer that writes it and the layer after which less than half is left (None: it
    reaches the end). magnitudes: |value| of the channel when it enters layer 0, and after each layer.
    """

    channel: int
    token: int
    value: float
    born: int
    gone: int | None
    magnitudes: tuple[float, ...]


@dataclass(frozen=True)
class LayerSpike:
    """Largest |input| and |output| of a layer's down projections: a point of the paper's Figure 3."""

    layer: int
    name: str
    input: float
    input_channel: int
    output: float
    output_channel: int


@dataclass(frozen=True)
class Detection:
    """super_weights: creators, then amplifiers, then companions, each by layer. cancellers: for information."""

    super_weights: tuple[SuperWeight, ...] = ()
    cancellers: tuple[SuperWeight, ...] = ()
    super_activations: tuple[SuperActivation, ...] = ()
    layers: tuple[LayerSpike, ...] = ()
    rounds: int = 0


def _reach(probe: Probe, channel: int) -> float:
    """The most that a channel of the residual stream ever holds."""
    return max(abs(float(state.values[channel])) for state in probe.residual[1:])


def _stays(probe: Probe, layer: int, channel: int, values: Tensor) -> Tensor:
    """int64 [tokens]: through how many layers after `layer` the channel keeps a third of `values` [tokens], or stands
    out (a model that normalizes the residual stream itself makes every value small)."""
    kept = torch.zeros(len(values), dtype=torch.int64)
    there = values != 0
    for state in probe.residual[layer + 2 :]:
        least = (KEPT * values.abs()).minimum(SPIKE * state.medians)
        there = there & (state.channel(channel) * values.sign() >= least)
        kept += there
    return kept


def _written(probe: Probe, base: Probe, layer: int, channel: int) -> int | None:
    """The token at which a layer writes a value into a channel that stands out and stays; of the largest such value."""
    entering, leaving = probe.residual[layer], probe.residual[layer + 1]
    before, after = entering.channel(channel), leaving.channel(channel)
    change, size = (after - before).abs(), after.abs()
    alone = change >= ALONE * change.median()
    largest = int(leaving.tokens[channel])
    alone[largest] = abs(float(leaving.values[channel])) >= abs(float(entering.values[channel]))
    passes = (
        alone
        & (size >= before.abs())
        & (change >= (WRITTEN * size).clamp(min=_enough(probe, base, channel)))
        & (size >= SPIKE * leaving.medians)
        & (_stays(probe, layer, channel, after) >= max(1, int(STAYS * (len(probe.residual) - 2 - layer))))
    )
    return int((size * passes).argmax()) if bool(passes.any()) else None


def _enough(probe: Probe, base: Probe, channel: int) -> float:
    """The least change of a channel that counts."""
    return OF_CHANNEL * max(_reach(probe, channel), _reach(base, channel))


def _comparable(output: float, base: LinearRecord | None) -> bool:
    """Whether an output of a down projection is about as large as its largest one in the base pass."""
    return base is None or abs(output) >= OF_PROJECTION * abs(base.output.value)


def _terms(
    name: str, layer: int, spike: Spike, token: int, residual: float, role: str, lesser: str
) -> list[SuperWeight]:
    return [
        SuperWeight(
            name=name,
            layer=layer,
            row=spike.output.channel,
            col=term.col,
            value=term.weight,
            role=role if index == 0 else lesser,
            token=token,
            input=term.input,
            output=spike.output.value,
            share=term.share,
            residual=residual,
        )
        for index, term in enumerate(spike.contributions)
        if term.share >= SHARE
    ]


def _find(probe: Probe, downs: Mapping[str, int], base: Probe) -> tuple[list[SuperWeight], list[SuperWeight]]:
    """(creators and their kin, cancellers) of one pass. base: the pass with nothing left out."""
    made: list[SuperWeight] = []
    undone: list[SuperWeight] = []
    for name, layer in downs.items():
        record = probe.linears.get(name)
        if record is None or record.input.ratio < SPIKE:
            continue
        for index, spike in enumerate(record.spikes):
            first = index == 0
            if spike.output.ratio < SPIKE or not (first or _comparable(spike.output.value, base.linears.get(name))):
                continue
            channel = spike.output.channel
            entering, leaving = probe.residual[layer], probe.residual[layer + 1]
            token = _written(probe, base, layer, channel)
            held, after = float(entering.values[channel]), float(leaving.values[channel])
            if token is not None:
                before, after = entering.at(token, channel), leaving.at(token, channel)
                role = "creator" if abs(before) < NEW * abs(after) else "amplifier"
                made += _terms(name, layer, spike, token, after, role, "companion")
            elif abs(held) - abs(after) >= _enough(probe, base, channel) and spike.output.value * held < 0:
                undone += _terms(name, layer, spike, int(leaving.tokens[channel]), after, "canceller", "canceller")
    return made, undone


def _unhidden(
    probe: Probe, base: Probe, downs: Mapping[str, int], found: Sequence[SuperWeight], ignored: set[Scalar]
) -> list[SuperWeight]:
    """The super weights of a pass without `found` that these had hidden."""
    known = ignored | {weight.scalar for weight in found}
    signs = {weight.row: weight.residual > 0 for weight in reversed(found)}
    new = []
    for weight in _find(probe, downs, base)[0]:
        if weight.scalar in known:
            continue
        if weight.row in signs:
            if signs[weight.row] == (weight.residual > 0):
                new.append(replace(weight, role="companion"))
        elif _comparable(weight.output, base.linears.get(weight.name)):
            held = base.residual[weight.layer + 1].at(weight.token, weight.row)
            if held / weight.residual >= HELD:
                new.append(weight)
    return new


def _activation(probe: Probe, weight: SuperWeight) -> SuperActivation:
    values = [float(state.values[weight.row]) for state in probe.residual]
    peak = max(values[weight.layer + 1 :], key=abs)
    top = values.index(peak)
    gone = next((i - 1 for i in range(top + 1, len(values)) if abs(values[i]) < 0.5 * abs(peak)), None)
    return SuperActivation(weight.row, weight.token, peak, weight.layer, gone, tuple(map(abs, values)))


def _spikes(probe: Probe, downs: Mapping[str, int]) -> tuple[LayerSpike, ...]:
    best: dict[int, LayerSpike] = {}
    for name, layer in downs.items():
        record = probe.linears.get(name)
        if record is None:  # an expert that no token visited
            continue
        spike = LayerSpike(
            layer, name, abs(record.input.value), record.input.channel, abs(record.output.value), record.output.channel
        )
        if layer not in best or spike.output > best[layer].output:
            best[layer] = spike
    return tuple(best[layer] for layer in sorted(best))


def _score(base: Tensor, pruned: Tensor, tokens: Tensor) -> tuple[float, float]:
    """(mean KL divergence, change of mean cross entropy) of logits [tokens, vocabulary]."""
    before, after = base.log_softmax(dim=-1), pruned.log_softmax(dim=-1)
    kl = float((before.exp() * (before - after)).sum(dim=-1).mean())
    if len(tokens) < 2:
        return max(kl, 0.0), 0.0
    target = tokens[1:].unsqueeze(1)
    return max(kl, 0.0), float((before[:-1].gather(1, target) - after[:-1].gather(1, target)).mean())


def detect(
    run: Callable[[Sequence[Scalar], bool], Probe], downs: Mapping[str, int], tokens: Tensor
) -> tuple[Detection, Probe]:
    """Find the super weights of a model; also returns what the first pass saw, for what comes after detection.

    run: `run(prune, record)` is one probe of the prompt with some weights left out (see `run_probe`).
    downs: name of every watched down projection -> its layer. tokens: int64 [tokens], the prompt.
    Raises ValueError where the model's output is not finite: nothing can be concluded from it.
    """
    base = run((), True)
    if not bool(torch.isfinite(base.logits).all()):
        raise ValueError("the model's output on the prompt is NaN or infinite")
    found, cancellers = _find(base, downs, base)
    ignored = {weight.scalar for weight in cancellers}
    rounds = 1
    while found and rounds < ROUNDS:
        probe = run([weight.scalar for weight in found], True)
        rounds += 1
        new = _unhidden(probe, base, downs, found, ignored)
        if not new:
            break
        found += new
    scored = []
    for weight in found:
        kl, loss = _score(base.logits, run([weight.scalar], False).logits, tokens)
        scored.append(replace(weight, kl=kl, loss=loss))
    activations: dict[int, SuperActivation] = {}
    for weight in found:
        if weight.role in ("creator", "amplifier"):
            activations.setdefault(weight.row, _activation(base, weight))
    order = {"creator": 0, "amplifier": 1, "companion": 2}
    scored.sort(key=lambda weight: (order[weight.role], weight.layer, -weight.share, weight.row, weight.col))
    detection = Detection(
        super_weights=tuple(scored),
        cancellers=tuple(weight for weight in cancellers if weight.row in activations),
        super_activations=tuple(activations.values()),
        layers=_spikes(base, downs),
        rounds=rounds,
    )
    return detection, base
