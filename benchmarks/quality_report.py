"""Tables and figures of the quality benchmark, from its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.base import CELLS, Cell
from peers.own import MIN_MAX
from peers.sweep import SIZES, VARIANTS

__all__ = ["draw", "tables"]

Record = Mapping[str, Any]
MAIN, OTHER = "wikitext2-test", "python"
SHOWN = 0.005  # perplexities closer than this are equal, on texts so short
TABLES = (  # some methods have no other block than 16 or 32 worth a row
    *(Cell(4, block) for block in ("16", "32")),
    *(cell for cell in CELLS if cell.bits == 4),
    Cell(3, "32"),
    *(cell for cell in CELLS if cell.bits == 3),
    *(Cell(2, block) for block in ("16", "32", "64", "128")),
)
# Okabe and Ito's palette: told apart by everyone.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def own(record: Record) -> bool:
    return str(record["method"]).startswith("swquant")


def of_tool(*words: str) -> Callable[[Record], bool]:
    """Data-free rows whose name begins with one of these."""
    return lambda record: str(record["method"]).startswith(words) and not record["calibrated"]


# Label, color, marker, which rows: in the order of the legend.
FAMILIES = (
    ("swquant", BLUE, "D", own),
    ("min/max rounding", "black", "x", of_tool(MIN_MAX)),
    ("HQQ", "#E69F00", "o", of_tool("HQQ")),
    ("SINQ", "#CC79A7", "v", of_tool("SINQ")),
    ("bitsandbytes NF4", "#56B4E9", "s", of_tool("bitsandbytes")),
    ("AutoRound", "#8C6D31", "^", of_tool("AutoRound")),
    ("torchao", "#BBBBBB", "P", of_tool("torchao")),
    ("ONNX Runtime", "#777777", "p", of_tool("ONNX")),
    ("llama.cpp", GREEN, "h", of_tool("llama.cpp")),
    ("calibrated on text", ORANGE, "*", lambda record: record["calibrated"]),
)


def closed(record: Record, originals: Mapping[str, Record], records: Sequence[Record]) -> float | None:
    """Share of what min/max rounding adds to the perplexity, in the same cell, that this method takes away again.

    None where it adds less than the text can show: of a model that has learned little, 4 bits take little.
    """
    cell = [item for item in records if (item["model"], item["cell"]) == (record["model"], record["cell"])]
    plain = next((item for item in cell if item["method"] == MIN_MAX and "texts" in item), None)
    if plain is None:
        return None
    best = originals[record["model"]]["texts"][MAIN]["perplexity"]
    worst, reached = plain["texts"][MAIN]["perplexity"], record["texts"][MAIN]["perplexity"]
    if worst is None or reached is None or worst < best * (1 + SHOWN):
        return None
    return (worst - reached) / (worst - best)


def closed_kl(record: Record, records: Sequence[Record]) -> float | None:
    """The same in KL, of which the original has none."""
    plain = next((item for item in records if item["method"] == MIN_MAX and "texts" in item), None)
    return None if plain is None else 1 - record["texts"][MAIN]["kl"] / plain["texts"][MAIN]["kl"]


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def perplexity(value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, ".2f" if value < 1e4 else ".1e")


def divergence(value: float) -> str:
    return format(value, ".4f" if value >= 0.005 else ".6f")


def line(record: Record, originals: Mapping[str, Record], records: Sequence[Record]) -> str:
    first, second = record["texts"][MAIN], record["texts"][OTHER]
    shares = (closed(record, originals, records), closed_kl(record, records))
    name = f"**{record['method']}**" if own(record) else record["method"]
    cells = [
        name,
        "text" if record["calibrated"] else "-",
        f"{record['bits']:.3f}",
        perplexity(first["perplexity"]),
        divergence(first["kl"]),
        f"{100 * first['top1']:.1f}",
        *("-" if share is None else f"{100 * share:.0f} %" for share in shares),
        perplexity(second["perplexity"]),
        divergence(second["kl"]),
    ]
    return f"| {' | '.join(cells)} |"


def tables(originals: Mapping[str, Record], records: Sequence[Record]) -> str:
    """One Markdown table per model and cell, best first, then the reasons of the methods without a result."""
    return "\n".join(_lines(originals, records)) + "\n"


def _lines(originals: Mapping[str, Record], records: Sequence[Record]) -> Iterator[str]:
    yield "# Quality without data: every table\n"
    yield "Written by `benchmarks/quality.py` from what `make quality` measured; [Quality](quality.md) says what it means."
    for key, original in originals.items():
        texts = original["texts"]
        first, second = texts[MAIN], texts[OTHER]
        yield f"\n## {original['name']}\n"
        yield (
            f"The original: perplexity {first['perplexity']:.2f} on {first['tokens']:,} tokens of WikiText-2, "
            f"{second['perplexity']:.2f} on {second['tokens']:,} of Python source. "
            f"{original['weights'] / 1e6:.1f} million weights are rounded."
        )
        for cell in TABLES:
            of_cell = [item for item in records if (item["model"], item["cell"]) == (key, str(cell))]
            if of_cell:
                yield from _cell_lines(cell, of_cell, originals)


def _cell_lines(cell: Cell, records: Sequence[Record], originals: Mapping[str, Record]) -> Iterator[str]:
    measured = sorted((item for item in records if "texts" in item), key=lambda item: item["texts"][MAIN]["kl"])
    yield f"\n{cell.title}:\n"
    yield "| method | reads | bits | perplexity | KL | top-1 % | closed: perplexity | KL | Python: perplexity | KL |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for record in measured:
        yield line(record, originals, records)
    for record in records:
        if "problem" in record:
            yield f"\n{record['method']}: {record['problem']}"
    for record in measured:
        for note in record["notes"]:
            yield f"\n{record['method']}: {note}"


def draw(originals: Mapping[str, Record], records: Sequence[Record], folder: Path) -> None:
    """Two figures per model: perplexity against stored bits, and against the size of a block."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for key, original in originals.items():
        measured = [item for item in records if item["model"] == key and "texts" in item]
        draw_bits(original, measured, folder / f"{key}-bits.png")
        draw_blocks(original, measured, folder / f"{key}-blocks.png")


def draw_bits(original: Record, records: Sequence[Record], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    records = [item for item in records if item["cell"] in {str(cell) for cell in TABLES}]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    base = original["texts"][MAIN]["perplexity"]
    handles: dict[str, Any] = {}
    for panel, bits in zip(panels, (4, 3), strict=True):
        limit = base * (2.5 if bits == 4 else 12)
        shown = [item for item in records if item["cell"].startswith(f"{bits}-")]
        for label, color, marker, matches in FAMILIES:
            points = [
                (item["bits"], value)
                for item in shown
                if matches(item) and (value := item["texts"][MAIN]["perplexity"]) and value < limit
            ]
            if points:
                size, order = (44, 4) if label == "swquant" else (26, 3)
                x, y = zip(*points, strict=True)
                handles[label] = panel.scatter(x, y, color=color, marker=marker, s=size, zorder=order)
        handles["original"] = panel.axhline(base, color="black", linewidth=1, linestyle="--")
        panel.set_title(f"{bits} bits", fontsize=10)
        panel.set_xlabel("stored bits per weight")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(MaxNLocator(8))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("perplexity, WikiText-2")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(original["name"], fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_blocks(original: Record, records: Sequence[Record], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    records = [item for item in records if item["method"].startswith("sweep")]
    if not records:
        return
    labels = {
        "rounded": "min/max rounding",
        "restored": "super weights restored",
        "refined": "refined, 0.05 % restored",
    }
    figure, panel = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for name, color, marker in zip(VARIANTS, (GREY, ORANGE, BLUE), "osD", strict=True):
        found = {
            item["cell"]: item["texts"][MAIN]["perplexity"] for item in records if item["method"] == f"sweep, {name}"
        }
        points = [(place, found[f"4-{size}"]) for place, size in enumerate(SIZES) if found.get(f"4-{size}")]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=labels[name])
    panel.axhline(original["texts"][MAIN]["perplexity"], color=GREEN, linewidth=1, linestyle="--", label="original")
    panel.set_xticks(range(len(SIZES)), [size.removeprefix("flat:") for size in SIZES])
    panel.set_xlabel("weights that share a scale")
    panel.set_ylabel("perplexity, WikiText-2")
    panel.set_yscale("log")
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=8)
    panel.set_title(f"{original['name']}, 4 bits", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
