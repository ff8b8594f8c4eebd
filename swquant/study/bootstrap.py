"""How much a number would vary with another text: resample the windows, 2,000 times, always in the same way.

An interval holds the middle 95 % of the resampled values. Two measurements are compared on the same resampled windows,
so what both find hard or easy in a text cancels. With few windows intervals are a little too narrow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swquant.drawing.section import Interval
from swquant.evaluate.pipeline import perplexity_of
from swquant.study.measuring import Scores

__all__ = ["agreement", "divergence", "excess_divergence", "excess_loss", "mean_of", "perplexity"]

_RESAMPLES = 2000


def _ratios(sums: Tensor, counts: Tensor) -> tuple[float, Tensor | None]:
    """sums / counts over all windows, and over each resample: float64 [resamples]."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return value, None
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=generator)
    return value, sums[picks].sum(dim=1) / counts[picks].sum(dim=1)


def _interval(value: float, samples: Tensor | None) -> Interval:
    if samples is None or not bool(torch.isfinite(samples).all()):
        return Interval(value)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def mean_of(sums: Tensor, counts: Tensor) -> Interval:
    """sum(sums) / sum(counts) of windows, float64 [windows] each."""
    return _interval(*_ratios(sums, counts))


def perplexity(scores: Scores) -> Interval:
    """As `swquant eval` reports it."""
    loss = mean_of(scores.nll, scores.tokens)
    ends = (
        (None, None) if loss.low is None or loss.high is None else (perplexity_of(loss.low), perplexity_of(loss.high))
    )
    return Interval(perplexity_of(loss.value), *ends)


def divergence(scores: Scores) -> Interval:
    """KL(original || model), nats per token."""
    return mean_of(scores.kl, scores.tokens)


def agreement(scores: Scores) -> Interval:
    """Share of tokens whose likeliest prediction is the original's."""
    return mean_of(scores.agree, scores.tokens)


def excess_loss(scores: Scores, base: Scores) -> Interval:
    """Mean loss minus that of `base` on the same windows, nats per token: log of the ratio of perplexities."""
    return mean_of(scores.nll - base.nll, base.tokens)


def excess_divergence(scores: Scores, other: Scores) -> Interval:
    """KL divergence from the original minus that of another model on the same windows, nats per token."""
    return mean_of(scores.kl - other.kl, scores.tokens)
