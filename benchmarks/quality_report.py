"""Tables and figures of the quality benchmark, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.base import CELLS, Cell
from peers.own import MIN_MAX

__all__ = ["draw", "print_tables"]

Record = Mapping[str, Any]
MAIN, OTHER = "wikitext2-test", "python"
# Okabe and Ito's palette: told apart by everyone.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def own(record: Record) -> bool:
    return str(record["method"]).startswith("swquant")


def closed(record: Record, originals: Mapping[str, Record], records: Sequence[Record]) -> float | None:
    """Share of what min/max rounding adds to the perplexity, in the same cell, that this method takes away again."""
    cell = [item for item in records if (item["model"], item["cell"]) == (record["model"], record["cell"])]
    plain = next((item for item in cell if item["method"] == MIN_MAX and "texts" in item), None)
    if plain is None:
        return None
    best = originals[record["model"]]["texts"][MAIN]["perplexity"]
    worst, reached = plain["texts"][MAIN]["perplexity"], record["texts"][MAIN]["perplexity"]
    return None if worst is None or reached is None else (worst - reached) / (worst - best)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, ".2f" if value < 1e4 else ".1e")


def line(record: Record, originals: Mapping[str, Record], records: Sequence[Record]) -> str:
    first, second = record["texts"][MAIN], record["texts"][OTHER]
    share = closed(record, originals, records)
    name = f"**{record['method']}**" if own(record) else record["method"]
    cells = [
        name,
        "text" if record["calibrated"] else "-",
        f"{record['bits']:.3f}",
        perplexity(first["perplexity"]),
        f"{first['kl']:.4f}",
        f"{100 * first['top1']:.1f}",
        "-" if share is None else f"{100 * share:.0f} %",
        perplexity(second["perplexity"]),
        f"{second['kl']:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


def print_tables(originals: Mapping[str, Record], records: Sequence[Record]) -> None:
    """One Markdown table per model and cell, best first, then the reasons of the methods without a result."""
    for key, original in originals.items():
        texts = original["texts"]
        first, second = texts[MAIN], texts[OTHER]
        print(f"\n### {original['name']}\n")
        print(
            f"The original: perplexity {first['perplexity']:.2f} on {first['tokens']:,} tokens of WikiText-2, "
            f"{second['perplexity']:.2f} on {second['tokens']:,} of Python source. "
            f"{original['weights'] / 1e6:.1f} million weights are rounded."
        )
        for cell in CELLS:
            print_cell(cell, [item for item in records if (item["model"], item["cell"]) == (key, str(cell))], originals)


def print_cell(cell: Cell, records: Sequence[Record], originals: Mapping[str, Record]) -> None:
    measured = sorted((item for item in records if "texts" in item), key=lambda item: item["texts"][MAIN]["kl"])
    if not records:
        return
    print(f"\n{cell.title}:\n")
    print("| method | reads | bits | perplexity | KL | top-1 % | closed | Python: perplexity | KL |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for record in measured:
        print(line(record, originals, records))
    for record in records:
        if "problem" in record:
            print(f"\n{record['method']}: {record['problem']}")
    for record in measured:
        for note in record["notes"]:
            print(f"\n{record['method']}: {note}")


def draw(originals: Mapping[str, Record], records: Sequence[Record], folder: Path) -> None:
    """Perplexity against stored bits, one figure per model."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for key, original in originals.items():
        measured = [item for item in records if item["model"] == key and "texts" in item]
        draw_bits(original, measured, folder / f"{key}-bits.png")


def draw_bits(original: Record, records: Sequence[Record], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    base = original["texts"][MAIN]["perplexity"]
    for panel, bits in zip(panels, (4, 3), strict=True):
        shown = [item for item in records if item["cell"].startswith(f"{bits}-") and item["texts"][MAIN]["perplexity"]]
        if not shown:
            continue
        limit = 3 * base if bits == 4 else 20 * base
        kinds = (
            ("data-free peers", GREY, "o", [item for item in shown if not own(item) and not item["calibrated"]]),
            ("calibrated peers", ORANGE, "s", [item for item in shown if item["calibrated"]]),
            ("swquant", BLUE, "D", [item for item in shown if own(item)]),
        )
        for label, color, marker, items in kinds:
            inside = [item for item in items if item["texts"][MAIN]["perplexity"] < limit]
            x = [item["bits"] for item in inside]
            y = [item["texts"][MAIN]["perplexity"] for item in inside]
            panel.scatter(x, y, color=color, marker=marker, s=26, label=label, zorder=3)
        panel.axhline(base, color=GREEN, linewidth=1, linestyle="--", label="original")
        panel.set_title(f"{bits} bits", fontsize=10)
        panel.set_xlabel("stored bits per weight")
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("perplexity, WikiText-2")
    panels[0].legend(fontsize=8)
    figure.suptitle(original["name"], fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
