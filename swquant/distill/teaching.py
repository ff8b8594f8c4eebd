"""Teaching: the student's weights move, its embeddings aside, towards the text and, while the stage lasts, the teacher.

The text is what the teacher writes at temperature 1, unless one is given. Both are cut into windows, the last eighth of
which is held out: it says when the teacher goes, and what training did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import context_of
from swquant.distill.options import DistillOptions
from swquant.distill.stages import Stages
from swquant.distill.student import StudentCheckpoint
from swquant.models.architecture import describe
from swquant.pr_moe import mixtures_of
from swquant.progress import Progress
from swquant.training.data import Batch, Corpus, own_windows
from swquant.training.loop import Schedule, State, train
from swquant.training.losses import balance, cross_entropy, divergence
from swquant.training.model import logits_of
from swquant.training.rates import settle

__all__ = ["Lesson", "held_out", "loss_for", "teach", "trainable", "windows_of"]


# The learning rate that a look begins at.
USUAL = 1e-4


@dataclass(frozen=True)
class Lesson:
    """What was taught. before, after: (cross entropy, KL from the teacher) of held-out text, in nats per token. until:
    the step from which the teacher was gone. looks: what was tried to find that out. rate: the learning rate; tried:
    those that were looked at -> held-out loss, None where that was no number."""

    text: str
    tokens: int
    parameters: int
    losses: list[float]
    until: int
    looks: list[dict[str, float]]
    before: tuple[float, float]
    after: tuple[float, float]
    rate: float
    tried: dict[str, float | None]


def windows_of(
    teacher: Checkpoint,
    model: PreTrainedModel,
    options: DistillOptions,
    start: int | None,
    state: State,
    progress: Progress,
) -> Corpus:
    """What the teacher writes. start: the token that a text begins with, None for any."""
    context, saved = context_of(teacher.config), state.saved.tensors
    length = options.window if context is None else min(options.window, context)
    return own_windows(model, start, saved, options.seed, progress, texts=options.texts, length=length, name="own text")


def teach(
    student: StudentCheckpoint,
    teacher: PreTrainedModel,
    pupil: PreTrainedModel,
    options: DistillOptions,
    text: Corpus,
    *,
    state: State,
    progress: Progress,
) -> Lesson:
    """Train `pupil` in place."""
    corpus, held = text.split()
    parameters, loss_of = trainable(student, pupil), loss_for(pupil, teacher, corpus, options)
    facts, until = state.saved.facts, options.stage(options.steps)
    facts.setdefault("before", list(held_out(pupil, teacher, held, options.batch)))

    def missed() -> float:
        return held_out(pupil, None, held, options.batch)[0]

    schedule = Schedule(options.steps, 0.0, tokens=options.batch * options.window)
    rate = settle(
        options.rate, facts, parameters, lambda step, _: loss_of(step, until != 0), missed, schedule, progress, usual=USUAL
    )  # fmt: skip
    stages = Stages(options.steps, rate, until, parameters, loss_of, missed, facts)
    trained = train(
        parameters, stages.loss, replace(schedule, rate=rate), state=state, progress=progress, label="Teaching"
    )
    (cross, apart), after = facts["before"], held_out(pupil, teacher, held, options.batch)
    return Lesson(
        corpus.name,
        sum(corpus.drawn(step, options.batch, options.seed).tokens for step in range(options.steps)),
        sum(parameter.numel() for parameter in parameters.values()),
        trained.losses,
        facts.get("until", options.steps),
        facts["looks"],
        (cross, apart),
        after,
        rate,
        facts["tried"],
    )


def loss_for(
    pupil: PreTrainedModel, teacher: PreTrainedModel, corpus: Corpus, options: DistillOptions
) -> Callable[[int, bool], Tensor]:
    """(step, with the teacher) -> L + alpha T² KL(teacher || student) of the step's batch, with what balances
    experts; of processes that train together what each has to add."""
    temperature = options.temperature
    for module in mixtures_of(pupil).values():
        module.recorded = True

    def loss_of(step: int, taught: bool) -> Tensor:
        batch, share = corpus.drawn(step, options.batch, options.seed).mine
        batch = batch.to(pupil.device)
        logits = logits_of(pupil, batch)
        loss = cross_entropy(logits, batch.ids[:, 1:], batch.counted)
        if taught and options.alpha:
            with torch.no_grad():
                goal = logits_of(teacher, batch) / temperature
            loss = loss + options.alpha * temperature**2 * divergence(logits / temperature, goal, batch.counted)
        return loss * share + balance(pupil, share)

    return loss_of


def trainable(student: StudentCheckpoint, pupil: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Every weight that is stored as the model holds it, embeddings and head aside. They can be trained from now on."""
    held = {*describe(student).targets.values()}
    heads = (pupil.get_input_embeddings(), pupil.get_output_embeddings())
    outside = {id(parameter) for head in heads if head is not None for parameter in head.parameters()}
    parameters = {
        name: parameter
        for name, parameter in pupil.named_parameters()
        if name in held and id(parameter) not in outside and parameter.is_floating_point()
    }
    if not parameters:
        raise SwquantError(f"{student.name}: no weight is stored as the model holds it; distill cannot train it")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


@torch.no_grad()
def held_out(pupil: PreTrainedModel, teacher: PreTrainedModel | None, held: Corpus, size: int) -> tuple[float, float]:
    """(cross entropy, KL from the teacher or 0) in nats per token of held-out text."""
    cross, apart = held.mean(size, lambda batch: _one(pupil, teacher, batch.to(pupil.device)))
    return cross, apart


def _one(pupil: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> tuple[float, float]:
    logits = logits_of(pupil, batch)
    loss = float(cross_entropy(logits, batch.ids[:, 1:], batch.counted))
    return loss, 0.0 if teacher is None else float(divergence(logits, logits_of(teacher, batch), batch.counted))
