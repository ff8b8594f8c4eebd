"""Experiment 6: how large a block may be (the paper's Figure 7).

All linear weights rounded in ever larger blocks, in the paper's flat order: to nearest; with outliers clipped; with the
super weights put back; and with all that one prompt can do: scales searched, one weight in 2,000 kept.
"""

from __future__ import annotations

import math

from calibrationless import Flat, parse_block
from swquant.drawing.section import Chart, Interval, Section, Series, Table
from swquant.study import bootstrap
from swquant.study.changes import METHODS, Change, bits_per_weight, original, rounded
from swquant.study.measuring import Measured, Scores
from swquant.study.subject import Subject

__all__ = ["changes", "conclude"]

PAPER = (
    "Rounding to nearest needs small blocks; with the super weight restored the block may grow and the loss grows more slowly "
    "(Figure 7)."
)
BLOCKS = ("flat:32", "flat:128", "flat:512", "flat:4096", "tensor")
# Part of the divergence that restoring must take away to count.
MATTERS = 0.05
_QUICK = ("flat:32", "flat:512", "tensor")


def _grid(subject: Subject) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(blocks, methods). Without super weights nothing could be restored."""
    methods = ("plain", "restored") if subject.quick else tuple(METHODS)
    if not subject.super_weights:
        methods = tuple(method for method in methods if method != "restored")
    return _QUICK if subject.quick else BLOCKS, methods


def changes(subject: Subject) -> tuple[Change, ...]:
    """Every method at every block size."""
    blocks, methods = _grid(subject)
    return (original(), *(rounded(block, method, subject) for method in methods for block in blocks))


def _size(block: str, subject: Subject) -> float:
    """Weights per block; of whole tensors, which differ, the geometric mean."""
    parsed = parse_block(block)
    if isinstance(parsed, Flat):
        return float(parsed.size)
    logs = [math.log(matrix.numel()) for matrix in subject.matrices()]
    return math.exp(sum(logs) / len(logs))


def conclude(subject: Subject, measured: Measured) -> Section:
    """Perplexity and divergence for every method and block size, with bits per weight."""
    blocks, methods = _grid(subject)
    scores = {(block, method): measured[rounded(block, method, subject)] for method in methods for block in blocks}
    bits = {pair: bits_per_weight(*pair, subject) for pair in scores}
    finding, agrees = _finding(subject, measured, scores)
    gguf = (
        "The weights come from a GGUF file and lie on a coarse grid already. Blocks that fall on that grid lose nothing, so small "
        "blocks look better here than they would for the model that the file was made from."
    )
    return Section(
        name="block-size",
        title="How large a block may be",
        paper=PAPER,
        finding=finding,
        agrees=agrees,
        charts=(
            _chart(subject, "block-size", "perplexity", "weights per block", scores, sizes=True),
            _chart(subject, "bits", "KL divergence, nats per token", "bits per weight", scores, sizes=False),
        ),
        tables=(
            Table(
                "block-size",
                f"{subject.bits} bits. " + "; ".join(f"{method}: {METHODS[method]}" for method in methods) + ". "
                "Bits per weight: codes, one scale per block, and what is kept exactly.",
                ("block", "method", "bits per weight", "perplexity", "KL divergence", "agreement"),
                tuple(
                    (
                        block,
                        method,
                        bits[block, method],
                        bootstrap.perplexity(item),
                        bootstrap.divergence(item),
                        bootstrap.agreement(item),
                    )
                    for (block, method), item in scores.items()
                ),
            ),
        ),
        notes=() if subject.checkpoint.stores_floats else (gguf,),
    )


def _finding(subject: Subject, measured: Measured, scores: dict[tuple[str, str], Scores]) -> tuple[str, bool | None]:
    base = bootstrap.perplexity(measured[original()])
    plain = {block: bootstrap.perplexity(item) for (block, method), item in scores.items() if method == "plain"}
    small, large = next(iter(plain)), list(plain)[-1]
    text = (
        f"Perplexity {base} becomes {plain[small]} in blocks of {_words(small)} and {plain[large]} in {_words(large)}, both "
        "rounded to nearest. "
    )
    if not subject.super_weights:
        return text + "There is no super weight to restore.", None
    # The paper's claim is about large blocks: the gain of restoring at each size, plain against restored.
    gains = {block: bootstrap.excess_divergence(scores[block, "restored"], scores[block, "plain"]) for block in plain}
    helped = [block for block in plain if _helps(gains[block], bootstrap.divergence(scores[block, "plain"]))]
    shown = ", ".join(f"{gain.value:+.2g} ({_words(block)})" for block, gain in gains.items())
    text += f"Holding out and restoring the super weights changes the KL divergence from the original by {shown} nats per token. "
    agrees = any(block in helped for block in list(plain)[-2:])
    if helped:
        text += f"It helps beyond noise with one scale for {', '.join(map(_words, helped))}"
        return text + ("." if agrees else ", but not in the largest, unlike in the paper."), agrees
    return text + "It helps nowhere beyond noise, unlike in the paper.", False


def _helps(gain: Interval, plain: Interval) -> bool:
    """Beyond noise, and by a part that matters."""
    return gain.high is not None and gain.high < 0 and gain.value < -MATTERS * plain.value


def _words(block: str) -> str:
    return "a whole tensor" if block == "tensor" else block.removeprefix("flat:")


def _chart(
    subject: Subject,
    name: str,
    ylabel: str,
    xlabel: str,
    scores: dict[tuple[str, str], Scores],
    *,
    sizes: bool,
) -> Chart:
    statistic = bootstrap.perplexity if sizes else bootstrap.divergence
    series = []
    for method in dict.fromkeys(method for _, method in scores):
        points = sorted(
            (
                (_size(block, subject) if sizes else bits_per_weight(block, method, subject), statistic(item))
                for (block, of), item in scores.items()
                if of == method
            ),
            key=lambda point: point[0],
        )
        values = [value for _, value in points]
        series.append(
            Series(
                method,
                tuple(x for x, _ in points),
                tuple(item.value for item in values),
                tuple(item.value if item.low is None else item.low for item in values),
                tuple(item.value if item.high is None else item.high for item in values),
            )
        )
    return Chart(
        name=name,
        title=f"Rounded to {subject.bits} bits: {ylabel.partition(',')[0]} by {xlabel}",
        alt=f"{ylabel} by {xlabel} for {', '.join(item.label for item in series)}; exact values in the table.",
        xlabel=xlabel,
        ylabel=ylabel,
        series=tuple(series),
        xlog=sizes,
        ylog=True,
    )
