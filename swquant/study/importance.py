"""Experiment 2: how much a super weight matters (the paper's Table 1).

Prune the super weights; prune thousands of the largest other weights; prune the super weights but restore the
activation that they make. Zero-shot tasks need data sets, which nothing here downloads: perplexity, KL divergence and
agreement stand in for them.
"""

from __future__ import annotations

from swquant.drawing.section import Bars, Cell, Section, Table
from swquant.study import bootstrap
from swquant.study.changes import Change, activation_restored, largest_pruned, original, scaled
from swquant.study.measuring import Measured
from swquant.study.subject import Subject

__all__ = ["changes", "conclude"]

PAPER = (
    "Pruning Llama-7B's one super weight takes perplexity on WikiText-2 from 5.67 to 1211; pruning the 7,000 largest other "
    "weights takes it to 6.08. Restoring the super activation alone recovers a part of the quality (Table 1)."
)
MANY = 7000
# The paper's 7,000 weights are this share of Llama-7B's linear weights.
SHARE = MANY / 6.476e9
# In a tiny model thousands would be a good part of it: no more than one in so many.
SMALL = 10_000
# Pruned one by one in addition, where there are several.
SINGLE = 4


def _counts(subject: Subject) -> list[int]:
    """As many as the paper prunes, and as many as would be the same share of this model."""
    total = subject.weights
    return sorted({min(MANY, max(1, total // SMALL)), max(1, round(SHARE * total))})


def changes(subject: Subject) -> tuple[Change, ...]:
    """The rows of the table, in its order."""
    weights = subject.super_weights
    rows = [original()]
    if weights:
        rows.append(scaled(0, weights))
        if len(weights) > 1:
            rows += [scaled(0, (weight,)) for weight in weights[:SINGLE]]
        rows.append(activation_restored(weights))
    return (*rows, *(largest_pruned(count) for count in _counts(subject)))


def _labels(subject: Subject) -> list[str]:
    weights = subject.super_weights
    single = [f"only [{weight.row}, {weight.col}] of layer {weight.layer} pruned" for weight in weights[:SINGLE]]
    labels = [change.label for change in changes(subject)]
    if len(weights) > 1:
        labels[2 : 2 + len(single)] = single
    return labels


def conclude(subject: Subject, measured: Measured) -> Section:
    """Perplexity, KL divergence and agreement of every row, with intervals."""
    rows = list(zip(_labels(subject), (measured[change] for change in changes(subject)), strict=True))
    base = rows[0][1]
    cells: list[tuple[Cell, ...]] = [
        (
            label,
            bootstrap.perplexity(scores),
            bootstrap.excess_loss(scores, base) if index else None,
            bootstrap.divergence(scores) if index else None,
            bootstrap.agreement(scores) if index else None,
        )
        for index, (label, scores) in enumerate(rows)
    ]
    finding, agrees = _finding(subject, measured)
    perplexities = tuple(bootstrap.perplexity(scores) for _, scores in rows)
    return Section(
        name="importance",
        title="How much a super weight matters",
        paper=PAPER,
        finding=finding,
        agrees=agrees,
        charts=(
            Bars(
                "importance",
                "Perplexity of the model with weights pruned",
                "Perplexity, logarithmic, of the original and of each pruned model, with 95 % intervals.",
                "perplexity (95 % interval)",
                tuple(label for label, _ in rows),
                ("perplexity",),
                (perplexities,),
                xlog=True,
            ),
        ),
        tables=(
            Table(
                "importance",
                "Excess loss: mean loss minus the original's, nats per token. Agreement: share of tokens whose likeliest "
                "prediction is the original's. In parentheses 95 % intervals over the windows.",
                ("model", "perplexity", "excess loss", "KL divergence", "agreement"),
                tuple(cells),
            ),
        ),
    )


def _finding(subject: Subject, measured: Measured) -> tuple[str, bool | None]:
    base = measured[original()]
    count = _counts(subject)[-1]
    many = measured[largest_pruned(count)]
    others = f"pruning the {count:,} largest other weights makes it {bootstrap.perplexity(many)}"
    start = f"Perplexity is {bootstrap.perplexity(base)}; "
    if not subject.super_weights:
        return f"{start}{others}. There is no super weight to prune.", None
    pruned = measured[scaled(0, subject.super_weights)]
    restored = measured[activation_restored(subject.super_weights)]
    size = len(subject.super_weights)
    which = "the super weight" if size == 1 else f"the {size} super weights"
    loss, other, back = (bootstrap.excess_loss(scores, base) for scores in (pruned, many, restored))
    gap = bootstrap.excess_loss(pruned, many)
    agrees = gap.value > 0 if gap.low is None else gap.low > 0
    verdict = (
        f"{which} {'matters' if size == 1 else 'matter'} more than all those together"
        if agrees
        else f"{which} {'matters' if size == 1 else 'matter'} no more than those, unlike in the paper"
    )
    recovered = 1 - back.value / loss.value if loss.value > 0 else 0.0
    share = (
        f"Restoring the super activation alone wins back {recovered:.0%} of the loss."
        if loss.value > 0 and recovered > 0
        else "Restoring the super activation alone wins nothing back."
    )
    text = (
        f"{start}pruning {which} makes it {bootstrap.perplexity(pruned)}; {others}: {verdict} "
        f"({loss.value:.3g} against {other.value:.3g} nats per token). {share}"
    )
    return text, agrees
