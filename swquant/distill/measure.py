"""Which layers a model misses least: each left out in turn, on text that the model writes itself.

What leaving a layer out does is the divergence of the predictions, KL(all layers || without it), mean over the tokens.
The layer that costs least goes first, then the one that costs least without it, and so on (greedily): later rounds look
at the cheaper half of the round before. Layers that create or cancel a super activation are not among the candidates,
but what they would cost is measured in the first round and told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.detect.found import Found
from swquant.detect.texts import start_token, write_text
from swquant.evaluate.pipeline import score_window
from swquant.progress import Progress, silent

__all__ = ["Measured", "least_missed", "leaving_out", "super_layers"]

TEXTS, LENGTH = 4, 96


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
    for weight in found.detection.super_weights:
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
    tokens = write_text(model, start_token(checkpoint, found), seed, progress, texts=TEXTS, length=LENGTH)
    reference = _logits(model, tokens)
    rounds = len(layers) + sum(max(len(candidates) // 2 - number, 1) for number in range(1, count))

    gone: list[tuple[int, float]] = []
    with progress.tokens("Leaving layers out", rounds) as bar:

        def cost(layer: int) -> float:
            bar.advance(f"layer {layer}", 1)
            out = [layers[number] for number, _ in gone] + [layers[layer]]
            with leaving_out(model, out):
                return _divergence(_logits(model, tokens), reference)

        alone = {layer: cost(layer) for layer in range(len(layers))}
        costs = {layer: alone[layer] for layer in candidates}
        while len(gone) < count:
            if gone:
                costs = {layer: cost(layer) for layer in costs}
            best = min(costs, key=costs.__getitem__)
            gone.append((best, costs.pop(best)))
            enough = max(len(candidates) // 2, count) - len(gone)
            costs = dict(sorted(costs.items(), key=lambda item: item[1])[:enough])
    return Measured(alone, tuple(gone))


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[texts · length, vocabulary]"""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.flatten(0, 1)


def _divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || logits) in nats."""
    nobody = torch.zeros(len(logits), dtype=torch.int64)
    return score_window(logits, nobody, reference).kl / len(logits)
