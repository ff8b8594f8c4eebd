"""Which layers a model misses least: each left out in turn, on text that the model writes itself.

What leaving a layer out does is the divergence of the predictions, KL(all layers || without it), mean over the tokens.
The layer that costs least goes first, then the one that costs least without it, and so on (greedily). The first round
tries every layer and is a cut: later rounds look at the twice as many that cost least as have to go. Layers that create
or cancel a super activation are not among the candidates, but what they would cost is measured in the first round and
told.

What lies before the layer that is tried is what it was in the round's pass with all layers: it is not computed again.
What entered each layer then is remembered, and handed to what follows the layer; layers before it do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import begins_with
from swquant.detect.found import Found
from swquant.detect.texts import write_text
from swquant.evaluate.pipeline import score_window
from swquant.progress import Progress, silent

__all__ = ["Measured", "least_missed", "leaving_out", "super_layers"]

TEXTS, LENGTH = 4, 96
_SPARE = 4  # candidates more than have to go, at least


@dataclass(frozen=True)
class Measured:
    """alone: layer -> KL in nats per token with it alone left out. order: (layer, KL with it and all before it left
    out), in the order in which they went."""

    alone: dict[int, float]
    order: tuple[tuple[int, float], ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(sorted(layer for layer, _ in self.order))


def super_layers(found: Found) -> dict[int, str]:
    """Layer -> what it does to a super activation: creates or cancels it."""
    roles: dict[int, str] = {}
    for weight in found.detection.cancellers:
        roles[weight.layer] = "cancels"
    for weight in reversed(found.detection.super_weights):  # creators are first, and a companion is one in part
        roles[weight.layer] = "creates" if weight.role == "creator" else "amplifies"
    return roles


@contextmanager
def leaving_out(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Inside, the layers with these names hand on what they are given."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    with ExitStack() as stack:
        for module in modules:
            module.forward = _handing_on(module.forward)
            stack.callback(delattr, module, "forward")
        yield


def _handing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What a layer does that does nothing: its form of a result is seen once."""
    seen: list[int | None] = []

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            result = forward(*args, **kwargs)
            seen.append(len(result) if isinstance(result, tuple) else None)
        given = args[0] if args else kwargs["hidden_states"]
        return given if seen[0] is None else (given, *[None] * (seen[0] - 1))

    return hand_on


@dataclass
class _Trial:
    """Passes over the same tokens with layers left out. inputs: layer -> what entered it in the last whole pass, of
    that round. forms: layer -> how many things it returns, None for a bare tensor."""

    model: PreTrainedModel
    layers: Sequence[str]
    tokens: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    forms: dict[int, int | None] = field(default_factory=dict)

    def whole(self, gone: Collection[int]) -> Tensor:
        """Logits [texts · length, vocabulary] with some layers left out; begins a round."""
        return self._run({layer: self._noted(layer, layer in gone) for layer in range(len(self.layers))})

    def without(self, layer: int, gone: Collection[int]) -> Tensor:
        """The same with one more layer left out."""
        before: dict[int, Callable[..., Any]] = {other: self._handing(other, None) for other in (*range(layer), *gone)}
        return self._run({**before, layer: self._handing(layer, self.inputs[layer])})

    def _run(self, forwards: Mapping[int, Callable[..., Any]]) -> Tensor:
        with ExitStack() as stack:
            for layer, forward in forwards.items():
                module: Any = self.model.get_submodule(self.layers[layer])
                module.forward = forward
                stack.callback(delattr, module, "forward")
            logits: Tensor = self.model(input_ids=self.tokens.to(self.model.device), use_cache=False).logits
        return logits.flatten(0, 1)

    def _noted(self, layer: int, gone: bool) -> Callable[..., Any]:
        """What a layer does, or nothing, with what entered it remembered."""
        forward: Any = self._handing(layer, None) if gone else self.model.get_submodule(self.layers[layer]).forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.inputs[layer] = _given(args, kwargs)
            result = forward(*args, **kwargs)
            self.forms[layer] = len(result) if isinstance(result, tuple) else None
            return result

        return run

    def _handing(self, layer: int, value: Tensor | None) -> Callable[..., Any]:
        """What a layer does that hands on what it is given, or `value`."""

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            given, form = _given(args, kwargs) if value is None else value, self.forms[layer]
            return given if form is None else (given, *[None] * (form - 1))

        return hand_on


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor


@torch.no_grad()
def least_missed(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    found: Found,
    count: int,
    kept: Sequence[int],
    *,
    seed: int,
    progress: Progress = silent,
) -> Measured:
    """Leave out `count` layers. model: in float32. kept: layers that stay whatever they cost."""
    layers = found.architecture.layers
    candidates = [layer for layer in range(len(layers)) if layer not in kept]
    if count > len(candidates):
        raise SwquantError(
            f"{checkpoint.name}: {count} layers are to go, {len(candidates)} of {len(layers)} may; keep more, or add "
            "--no-keep-super"
        )
    tokens = write_text(model, begins_with(checkpoint), seed, progress, texts=TEXTS, length=LENGTH)
    trial = _Trial(model, layers, tokens)
    reference = trial.whole(())
    gone: list[tuple[int, float]] = []
    size = min(len(candidates), max(2 * count, count + _SPARE))  # of the later rounds
    passes = len(layers) + sum(size - number for number in range(1, count))
    with progress.tokens("Leaving layers out", passes) as bar:

        def cost(layer: int) -> float:
            bar.advance(f"layer {layer}", 1)
            return _divergence(trial.without(layer, [number for number, _ in gone]), reference)

        alone = {layer: cost(layer) for layer in range(len(layers))}
        costs = {layer: alone[layer] for layer in sorted(candidates, key=alone.__getitem__)[:size]}
        while len(gone) < count:
            if gone:
                trial.whole([number for number, _ in gone])
                costs = {layer: cost(layer) for layer in costs}
            best = min(costs, key=costs.__getitem__)
            gone.append((best, costs.pop(best)))
    return Measured(alone, tuple(gone))


def _divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || logits) in nats."""
    nobody = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return score_window(logits, nobody, reference).kl / len(logits)
