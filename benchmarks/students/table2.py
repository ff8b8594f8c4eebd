"""Table 2 of DeepSpeed-MoE in small: what pyramid and residual are worth, from scratch, at equal tokens.

Llamas of eight layers read bytes, those of all texts in `data/` but the last eighth of each, which is measured on; text
is read in the same order by all. Every second layer's MLP is a mixture, as in the paper, and with --experts 16:

    dense              no mixture
    standard           16 experts in each of four layers, one chosen by a token
    residual           the same beside a fixed MLP
    pyramid            4, 4, 4 and 8 experts: the paper's quarter and half
    pyramid-residual   both
    student            of the latter: seven of eight layers, from scratch, with it as the teacher for 60 % of the steps
    student alone      the same without a teacher

active: the weights that a token meets. Loss: nats per byte of held-out text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from students.world import Cell, Results, Settings
from swquant.distill.student import cut_config
from swquant.distill.teaching import held_out
from swquant.pr_moe import PrMoeConfig, PrMoeForCausalLM, mixtures_of
from swquant.training.data import Corpus, token_windows
from swquant.training.loop import Schedule, train
from swquant.training.losses import balance, cross_entropy, divergence
from swquant.training.model import logits_of

__all__ = ["KINDS", "table2"]

LAYERS, HIDDEN, NEURONS, HEADS = 8, 64, 192, 4
WINDOW, BATCH, RATE, TAUGHT = 128, 8, 3e-3, 0.6
LEFT_OUT = 4  # the layer, without a mixture, that students do not have


@dataclass(frozen=True)
class Kind:
    """shares: of --experts, of each mixture; none for a dense model. teacher: whether one is learned from; None for
    what is no student."""

    shares: tuple[float, ...] = ()
    residual: bool = False
    teacher: bool | None = None


PYRAMID = (0.25, 0.25, 0.25, 0.5)
KINDS = {
    "dense": Kind(),
    "standard": Kind((1.0,) * 4),
    "residual": Kind((1.0,) * 4, residual=True),
    "pyramid": Kind(PYRAMID),
    "pyramid-residual": Kind(PYRAMID, residual=True),
    "student": Kind(PYRAMID, residual=True, teacher=True),
    "student alone": Kind(PYRAMID, residual=True, teacher=False),
}


def table2(files: dict[str, Path], settings: Settings, results: Results) -> None:
    """A cell for every kind and seed."""
    texts = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    cell = results.of("table2", {"texts": texts, "scratch": settings.scratch, "experts": settings.experts})
    splits = [_bytes_of(file).split() for file in files.values()]
    corpus, held = (Corpus("bytes", sum((part[side].sequences for part in splits), ())) for side in (0, 1))

    @cache  # the teacher of both students; after an interruption it is made again, the same
    def trained(name: str, seed: int) -> tuple[PrMoeForCausalLM, Cell]:
        kind = KINDS[name]
        teacher = trained("pyramid-residual", seed)[0] if kind.teacher else None
        return _train(kind, teacher, corpus, held, settings, seed)

    for seed in range(settings.first, settings.seeds):
        for name in KINDS:
            cell(f"{name} {seed}", lambda name=name, seed=seed: trained(name, seed)[1])
        trained.cache_clear()


def _bytes_of(file: Path) -> Corpus:
    """A text's bytes in windows."""
    content = torch.tensor([*file.read_bytes()], dtype=torch.int64)
    return token_windows(content[: len(content) // WINDOW * WINDOW].view(-1, WINDOW), file.name)


def model_of(kind: Kind, experts: int, seed: int) -> PrMoeForCausalLM:
    """With random weights."""
    text = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=WINDOW,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    places = [layer for layer in range(LAYERS) if layer % 2]
    if kind.teacher is not None:
        keep = [layer for layer in range(LAYERS) if layer != LEFT_OUT]
        places = [keep.index(layer) for layer in places]
        text = LlamaConfig(**cut_config(text.to_dict(), text, keep, LAYERS))
    mixtures = [
        {"layer": layer, "module": f"model.layers.{layer}.mlp", "down": "down_proj", "experts": max(round(share * experts), 2), "size": NEURONS}
        for layer, share in zip(places, kind.shares, strict=False)
    ]  # fmt: skip
    torch.manual_seed(seed)
    model = PrMoeForCausalLM(PrMoeConfig(text, mixtures, residual=kind.residual, capacity=1.0))
    with torch.no_grad():
        for module in mixtures_of(model).values():
            for parameter in (module.gate.weight, *module.experts.parameters()):
                parameter.normal_(0, text.initializer_range)  # they begin as copies of one MLP
    return model


def _train(
    kind: Kind, teacher: nn.Module | None, corpus: Corpus, held: Corpus, settings: Settings, seed: int
) -> tuple[PrMoeForCausalLM, Cell]:
    model, began = model_of(kind, settings.experts, seed).to(settings.device).train(), time.perf_counter()
    for module in mixtures_of(model).values():
        module.recorded = True
    loss_of = _loss(model, teacher, corpus, settings.scratch, seed)
    losses = train(dict(model.named_parameters()), loss_of, Schedule(settings.scratch, RATE)).losses
    seconds = time.perf_counter() - began
    loss = held_out(model.eval(), None, held, BATCH)[0]
    return model, {**weights_of(model), "loss": loss, "trained": losses[-1], "seconds": round(seconds, 1)}


def _loss(
    model: PrMoeForCausalLM, teacher: nn.Module | None, corpus: Corpus, steps: int, seed: int
) -> Callable[[int, int], Tensor]:
    def loss_of(step: int, part: int) -> Tensor:
        batch = corpus.drawn(step, BATCH, seed).to(model.device)
        logits = logits_of(model, batch)
        loss = cross_entropy(logits, batch.ids[:, 1:], batch.counted) + balance(model)
        if teacher is not None and step < TAUGHT * steps:
            with torch.no_grad():
                goal = logits_of(teacher, batch)
            loss = loss + divergence(logits, goal, batch.counted)
        return loss

    return loss_of


def weights_of(model: nn.Module) -> dict[str, int]:
    """All weights, those of experts, and those that a token meets."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = active = 0
    for module in mixtures_of(model).values():
        each = sum(parameter.numel() for parameter in module.experts[0].parameters())
        experts += each * len(module.experts)
        active += each * module.top
    return {"parameters": total, "experts": experts, "active": total - experts + active}
