"""What runs while blocks are chosen and trained: the model, its teacher, and the loss of a batch.

With a teacher the loss is the divergence from its predictions, without one the cross entropy with the text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swquant.training.data import Batch, Corpus
from swquant.training.losses import cross_entropy, divergence
from swquant.training.model import logits_of
from swquant.tune.options import TuneOptions

__all__ = ["Session"]


@dataclass(frozen=True)
class Session:
    """model: what is trained, on whatever device. teacher: the original, on the same or another, or None. corpus: to
    train on; held: text that no step sees."""

    model: Any
    teacher: Any
    corpus: Corpus
    held: Corpus
    options: TuneOptions

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, in nats per token that counts."""
        place = self.model.device
        batch = batch.to(place)
        half = self.options.precision == "bfloat16"
        with torch.autocast(place.type, torch.bfloat16) if half else nullcontext():
            logits = logits_of(self.model, batch)
            if self.teacher is None:
                return cross_entropy(logits, batch.ids[:, 1:], batch.counted)
            with torch.no_grad():
                goal = logits_of(self.teacher, batch.to(self.teacher.device)).to(place)
        return divergence(logits, goal, batch.counted)

    def batch_of(self, step: int) -> Batch:
        """What a step sees."""
        return self.corpus.drawn(step, self.options.batch, self.options.seed)

    def loss_of(self, step: int, part: int) -> Tensor:
        """For `training.train`: a step is one batch, of whose loss this is what this process has to add."""
        batch, share = self.batch_of(step).mine
        return self.loss(batch) * share

    def held_out(self) -> float:
        """The loss on held-out text, a mean over its tokens."""
        with torch.no_grad():
            return self.held.mean(self.options.batch, lambda batch: (float(self.loss(batch)),))[0]

    def warmup(self) -> list[Callable[[], Tensor]]:
        """The losses of the batches that choose the blocks: others than those of the first steps, where there are
        enough."""
        first = self.options.steps

        def of(number: int) -> Callable[[], Tensor]:
            return lambda: self.loss(self.batch_of(number))

        return [of(first + number) for number in range(self.options.warmup)]
