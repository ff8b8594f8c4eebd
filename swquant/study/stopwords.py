"""Experiment 4: without super weights the model writes stopwords (the paper's Figures 5 and 11).

The mean probability that the model gives to every token of its vocabulary, over all positions of the text, before and
after: how much of it lies on stopwords, and which tokens gain and lose most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swquant.drawing.section import Bars, Interval, Section, Table
from swquant.study import bootstrap
from swquant.study.changes import Change, original, scaled
from swquant.study.measuring import Measured, Scores
from swquant.study.subject import Subject

__all__ = ["STOPWORDS", "changes", "conclude"]

PAPER = (
    "Without its super weight the model puts two to ten times as much probability on stopwords: “the” twice, “.” five times, "
    "“,” ten times (Figures 5 and 11)."
)
_LIST = """
a about above after again against all also am an and any are as at be because been before being below between both but by can
could did do does doing down during each few for from further had has have having he her here hers herself him himself his how i
if in into is it its itself just me more most my myself no nor not now of off on once only or other our ours ourselves out over
own same she should so some such than that the their theirs them themselves then there these they this those through to too
under until up very was we were what when where which while who whom why will with would you your yours yourself
. , ; : ! ? - ' " ( )
"""
STOPWORDS = frozenset(_LIST.split())
_SHOWN = 8


def changes(subject: Subject) -> tuple[Change, ...]:
    """The original and the model without super weights."""
    return (original(), scaled(0, subject.super_weights)) if subject.super_weights else ()


def conclude(subject: Subject, measured: Measured) -> Section:
    """Probability on stopwords, and the tokens that gain and lose most."""
    title = "Without super weights, stopwords"
    if not subject.super_weights:
        return Section("stopwords", title, PAPER, "Not shown: there is no super weight to prune.")
    before, after = (measured[change] for change in changes(subject))
    assert before.mass is not None
    assert after.mass is not None
    words = _words(subject, before.mass.shape[1])
    stop = torch.tensor([word.strip().lower() in STOPWORDS for word in words])
    if not bool(stop.any()):
        return Section("stopwords", title, PAPER, "Not shown: the tokenizer has no English stopword.")
    shares = tuple(_probability(scores, stop) for scores in (before, after))
    change = bootstrap.mean_of((_sums(after, stop) - _sums(before, stop)), before.tokens)
    agrees = change.value > 0 if change.low is None else change.low > 0
    moved = _moved(before.mass.mean(dim=0), after.mass.mean(dim=0))
    largest = before.mass.mean(dim=0).masked_fill(~stop, -1.0).topk(min(_SHOWN, int(stop.sum()))).indices.tolist()
    return Section(
        name="stopwords",
        title=title,
        paper=PAPER,
        finding=_finding(shares, change, agrees),
        agrees=agrees,
        charts=(
            _bars("stopwords", "The likeliest stopwords", largest, before, after, words),
            _bars("tokens", "Tokens that gain and lose most", moved, before, after, words),
        ),
        tables=(
            Table(
                "stopwords",
                "Mean probability of all stopwords together, of the likeliest, and of the tokens that gain and lose most.",
                ("token", "id", "original", "super weights pruned", "times"),
                (
                    ("all stopwords", None, *shares, _times(shares[0].value, shares[1].value)),
                    *(_row(index, before, after, words) for index in dict.fromkeys((*largest, *moved))),
                ),
            ),
        ),
        notes=("The stopwords are English; on a text in another language this experiment says little.",),
    )


def _words(subject: Subject, vocabulary: int) -> list[str]:
    """Text of every token; empty for numbers that the tokenizer does not know."""
    tokenizer = subject.checkpoint.tokenizer()
    known = min(vocabulary, len(tokenizer))
    return [*tokenizer.batch_decode([[index] for index in range(known)]), *([""] * (vocabulary - known))]


def _sums(scores: Scores, tokens: Tensor) -> Tensor:
    """Probability of some tokens together, summed over the positions of each window: float64 [windows]."""
    assert scores.mass is not None
    return scores.mass[:, tokens].sum(dim=1, dtype=torch.float64) * scores.tokens


def _probability(scores: Scores, tokens: Tensor) -> Interval:
    return bootstrap.mean_of(_sums(scores, tokens), scores.tokens)


def _moved(before: Tensor, after: Tensor) -> list[int]:
    """Tokens that gain most, largest gain first, then those that lose most, largest loss last."""
    change = after - before
    count = min(_SHOWN // 2, len(change) // 2)
    gained = [index for index in change.topk(count).indices.tolist() if change[index] > 0]
    lost = [index for index in (-change).topk(count).indices.tolist() if change[index] < 0]
    return [*gained, *reversed(lost)]


def _times(before: float, after: float) -> float | None:
    return after / before if before > 0 else None


def _row(
    index: int, before: Scores, after: Scores, words: list[str]
) -> tuple[str | int | float | Interval | None, ...]:
    pair = [_probability(scores, torch.tensor([index])) for scores in (before, after)]
    return repr(words[index]), index, *pair, _times(pair[0].value, pair[1].value)


def _bars(name: str, title: str, tokens: list[int], before: Scores, after: Scores, words: list[str]) -> Bars:
    return Bars(
        name=name,
        title=title,
        alt=f"Mean probability of {', '.join(repr(words[token]) for token in tokens)}, with and without the super weights.",
        xlabel="mean probability (95 % interval)",
        categories=tuple(repr(words[token]) for token in tokens),
        labels=("original", "super weights pruned"),
        values=tuple(
            tuple(_probability(scores, torch.tensor([token])) for token in tokens) for scores in (before, after)
        ),
    )


def _finding(shares: tuple[Interval, ...], change: Interval, agrees: bool) -> str:
    before, after = shares
    text = (
        f"Stopwords hold {before.value:.1%} of the probability; without the super weights {after.value:.1%}, "
        f"{after.value / before.value if before.value else 0.0:.2g} times as much"
    )
    if agrees:
        return text + "."
    if change.high is not None and change.high < 0:
        return text + ": they lose instead of gaining, unlike in the paper."
    return text + ": no change that could be told from noise, unlike in the paper."
