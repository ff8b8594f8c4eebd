"""Training a mixture: experts, gates and coefficients learn a text with the load-balancing loss, all else is frozen.

While it trains, an expert takes no more tokens than its capacity; how many were turned away is counted, and which share
of the held-out tokens each expert got afterwards, by depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swquant.checkpoints.base import Checkpoint
from swquant.models.loading import build_model
from swquant.moe.options import MoeOptions
from swquant.parallel import world
from swquant.pr_moe import mixtures_of
from swquant.progress import Progress
from swquant.training.data import Batch, Corpus, text_windows
from swquant.training.loop import Schedule, State, train
from swquant.training.losses import balance, cross_entropy
from swquant.training.model import logits_of
from swquant.training.rates import settle

__all__ = ["Course", "train_mixture"]

# The learning rate that a look begins at.
USUAL = 3e-4


@dataclass(frozen=True)
class Course:
    """What training did. before, after: cross entropy of held-out text in nats per token. dropped: share of the
    tokens that found their expert full. shares: of the held-out tokens, per mixture and expert. rate: the learning
    rate; tried: those that were looked at -> held-out loss, None where that was no number."""

    text: str
    tokens: int
    parameters: int
    losses: list[float]
    before: float
    after: float
    dropped: float
    shares: list[list[float]]
    rate: float
    tried: dict[str, float | None]


def train_mixture(
    checkpoint: Checkpoint,
    text: tuple[str, str],
    options: MoeOptions,
    device: torch.device,
    *,
    state: State,
    progress: Progress,
) -> tuple[Course, dict[str, Tensor]]:
    """Train a mixture that was just made. Returns what happened and name -> what the trained parameters became."""
    model = build_model(checkpoint, torch.float32, device).requires_grad_(False)
    corpus, held = text_windows(checkpoint, text[1], options.window, text[0]).split()
    parameters = _trainable(model)
    mixtures = list(mixtures_of(model).values())
    facts = state.saved.facts
    facts.setdefault("before", _held_out(model, held, options.batch))

    def loss_of(step: int, part: int) -> Tensor:
        batch, share = corpus.drawn(step, options.batch, options.seed).mine
        batch = batch.to(device)
        for module in mixtures:
            module.training, module.recorded = True, True
            module.capacity = options.capacity or None
        loss = cross_entropy(logits_of(model, batch), batch.ids[:, 1:], batch.counted)
        (dropped,) = world().totals(sum(module.dropped for module in mixtures))
        # By step, since one that was interrupted is taken again.
        facts["dropped"] = [*facts.get("dropped", [])[:step], int(dropped)]
        return loss * share + balance(model, share)

    def missed() -> float:
        for module in mixtures:
            module.training = False
        return _held_out(model, held, options.batch)

    schedule = Schedule(options.steps, 0.0, tokens=options.batch * options.window)
    rate = settle(options.rate, facts, parameters, loss_of, missed, schedule, progress, usual=USUAL)
    trained = train(parameters, loss_of, replace(schedule, rate=rate), state=state, progress=progress)
    after = missed()
    course = Course(
        corpus.name,
        sum(corpus.drawn(step, options.batch, options.seed).tokens for step in range(options.steps)),
        sum(parameter.numel() for parameter in parameters.values()),
        trained.losses,
        facts["before"],
        after,
        sum(facts["dropped"])
        / (options.steps * options.batch * options.window * sum(module.top for module in mixtures)),
        _shares(model, held, options.batch),
        rate,
        facts["tried"],
    )
    return course, {name: parameter.detach().cpu() for name, parameter in parameters.items()}


def _trainable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Experts, gates and coefficients; the fixed MLPs stay as they are."""
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in mixtures_of(model).items():
        for name, parameter in module.named_parameters():
            if not name.startswith("mlp."):
                parameter.requires_grad_(True)
                parameters[f"{prefix}.{name}"] = parameter
    return parameters


@torch.no_grad()
def _held_out(model: PreTrainedModel, held: Corpus, size: int) -> float:
    def loss(batch: Batch) -> tuple[float]:
        batch = batch.to(model.device)
        return (float(cross_entropy(logits_of(model, batch), batch.ids[:, 1:], batch.counted)),)

    return held.mean(size, loss)[0]


@torch.no_grad()
def _shares(model: PreTrainedModel, held: Corpus, size: int) -> list[list[float]]:
    """Of every mixture, which share of the held-out tokens went to each expert."""
    mixtures = mixtures_of(model).values()
    counts = [torch.zeros(len(module.experts)) for module in mixtures]
    for batch in held.mine.batches(size):
        logits_of(model, batch.to(model.device))
        for count, module in zip(counts, mixtures, strict=True):
            assert module.routed is not None
            count += module.routed.cpu()
    world().sum_(counts)
    return [[round(float(part), 4) for part in count / count.sum()] for count in counts]
