"""Experiment 5: super weights made larger or smaller (the paper's Figures 6 and 8).

All super weights times a factor from 0 to 3. A factor that looks best on a text is best on that text by construction;
so it is chosen on the first half of the windows and judged on the second.
"""

from __future__ import annotations

from swquant.drawing.section import Chart, Interval, Section, Series, Table
from swquant.study import bootstrap
from swquant.study.changes import Change, scaled
from swquant.study.measuring import Measured
from swquant.study.subject import Subject

__all__ = ["FACTORS", "changes", "conclude"]

PAPER = (
    "Quality rises a little when the super weight is multiplied by somewhat more than 1, and falls on both sides "
    "(Figures 6 and 8; best between 1 and 1.5, less than a point of zero-shot accuracy)."
)
FACTORS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0)
_QUICK = (0.0, 0.5, 1.0, 1.25, 2.0, 3.0)


def _factors(subject: Subject) -> tuple[float, ...]:
    return _QUICK if subject.quick else FACTORS


def changes(subject: Subject) -> tuple[Change, ...]:
    """One for each factor."""
    if not subject.super_weights:
        return ()
    return tuple(scaled(factor, subject.super_weights) for factor in _factors(subject))


def conclude(subject: Subject, measured: Measured) -> Section:
    """Perplexity and agreement by factor; the best factor, and whether it holds on other windows."""
    title = "Super weights amplified"
    if not subject.super_weights:
        return Section("amplification", title, PAPER, "Not shown: there is no super weight to scale.")
    factors = _factors(subject)
    scores = [measured[change] for change in changes(subject)]
    base = scores[factors.index(1.0)]
    perplexities = [bootstrap.perplexity(item) for item in scores]
    agreements = [bootstrap.agreement(item) for item in scores]
    best, gain = _best(subject, measured)
    better = best > 1 and gain is not None and gain.high is not None and gain.high < 0
    return Section(
        name="amplification",
        title=title,
        paper=PAPER,
        finding=_finding(best, gain),
        agrees=better,
        charts=(
            _chart("amplification", "Perplexity by factor", "perplexity", factors, perplexities, ylog=True),
            _chart("agreement", "Agreement with the original by factor", "same likeliest token", factors, agreements),
        ),
        tables=(
            Table(
                "amplification",
                "Super weights times a factor. Excess loss: mean loss minus the original's, nats per token.",
                ("factor", "perplexity", "excess loss", "KL divergence", "agreement"),
                tuple(
                    (
                        factor,
                        perplexities[index],
                        bootstrap.excess_loss(item, base) if factor != 1 else None,
                        bootstrap.divergence(item) if factor != 1 else None,
                        agreements[index],
                    )
                    for index, (factor, item) in enumerate(zip(factors, scores, strict=True))
                ),
            ),
        ),
    )


def _best(subject: Subject, measured: Measured) -> tuple[float, Interval | None]:
    """(factor with the least loss on the first half of the windows, its excess loss on the second half).

    One window cannot be halved: then there is nothing to judge with.
    """
    factors = _factors(subject)
    scores = {factor: measured[scaled(factor, subject.super_weights)] for factor in factors}
    half = len(scores[1.0].tokens) // 2
    if half == 0:
        return min(factors, key=lambda factor: float(scores[factor].nll.sum())), None
    best = min(factors, key=lambda factor: float(scores[factor].nll[:half].sum()))
    return best, bootstrap.excess_loss(scores[best][half:], scores[1.0][half:])


def _finding(best: float, gain: Interval | None) -> str:
    if gain is None:
        return f"Best at {best:g}; the text has a single window, which cannot tell that from noise."
    if best == 1:
        return "Best as it is: on the first half of the windows no other factor has a lower loss."
    text = f"Best on the first half of the windows at {best:g}; on the second half its loss is {abs(gain.value):.2g} nats per token "
    text += "lower" if gain.value < 0 else "higher"
    if gain.low is None or gain.high is None:
        return text + ", from a single window, which cannot tell it from noise."
    text += f" (95 % interval of the difference {gain.low:.2g} to {gain.high:.2g})"
    if gain.high < 0:
        return text + (
            ": more than noise." if best > 1 else ": more than noise, but in the other direction than in the paper."
        )
    if gain.low > 0:
        return text + ": what looked best was chance."
    return text + ": nothing that could be told from noise."


def _chart(
    name: str, title: str, label: str, factors: tuple[float, ...], values: list[Interval], ylog: bool = False
) -> Chart:
    low = tuple(item.value if item.low is None else item.low for item in values)
    high = tuple(item.value if item.high is None else item.high for item in values)
    return Chart(
        name=name,
        title=title,
        alt=f"{title}: factors {factors[0]:g} to {factors[-1]:g}, with 95 % intervals; exact values in the table.",
        xlabel="super weights times",
        ylabel=label,
        series=(Series(label, factors, tuple(item.value for item in values), low, high),),
        ylog=ylog,
    )
