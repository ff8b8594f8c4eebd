"""Tables in Markdown and curves, from what the JSON file holds: nothing is computed anew."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from students.figure4 import STAGINGS
from students.table2 import KINDS

__all__ = ["TABLES", "draw"]

Cells = Mapping[str, Any]
# Okabe and Ito's palette: told apart by everyone.
COLORS = dict(zip(STAGINGS, ("#777777", "#D55E00", "#0072B2", "#009E73"), strict=True))


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation; the deviation of several only."""
    more = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def of_seeds(cells: Cells, name: str) -> list[Any]:
    """The cells of a row, seed by seed."""
    return [cell for key, cell in cells.items() if key.rpartition(" ")[0] == name]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """One table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def names_of(cells: Cells) -> list[str]:
    """The texts of `figure4`."""
    return list(dict.fromkeys(key.split(" ")[0] for key in cells))


def figure4(cells: Cells) -> str:
    rows = []
    for text in names_of(cells):
        first = of_seeds(cells, f"{text} {STAGINGS[0]}")
        if first:
            rows.append([text, "before", f"{first[0]['before'][0]:.4f}", f"{first[0]['before'][1]:.4f}", "", "", ""])
        for staging in STAGINGS:
            if done := of_seeds(cells, f"{text} {staging}"):
                loss, apart = ([cell["after"][at] for cell in done] for at in (0, 1))
                until = ", ".join(str(cell["until"]) for cell in done)
                seconds = statistics.median(cell["seconds"] for cell in done)
                rows.append([text, staging, spread(loss), spread(apart), until, len(done), f"{seconds:.0f}"])
    heads = ["text", "teacher", "cross entropy", "KL from the teacher", "gone at step", "seeds", "seconds"]
    return markdown(heads, rows)


def table2(cells: Cells) -> str:
    rows = []
    for name in KINDS:
        if done := of_seeds(cells, name):
            sizes = [f"{done[0][key]:,}" for key in ("parameters", "experts", "active")]
            loss, trained = ([cell[key] for cell in done] for key in ("loss", "trained"))
            rows.append([name, *sizes, spread(loss), spread(trained), len(done)])
    return markdown(
        ["model", "parameters", "of experts", "active", "loss held out", "loss of the last step", "seeds"], rows
    )


def rival(cells: Cells) -> str:
    texts = list(next(iter(cells.values()))["scores"])
    rows = []
    for key, cell in sorted(cells.items(), key=lambda item: -int(item[1]["bytes"])):
        scores = [f"{math.exp(cell['scores'][text][0]):.2f}, {cell['scores'][text][1]:.4f}" for text in texts]
        how = f" ({cell['staging']})" if cell.get("staging") else ""
        rows.append([key + how, f"{cell['bytes'] / 1e6:.2f} MB", cell.get("bits", ""), *scores])
    heads = ["model", "size", "bits", *(f"{text}: perplexity, KL" for text in texts)]
    return "\n\n".join([markdown(heads, rows), *winners(cells, texts)])


def winners(cells: Cells, texts: Sequence[str]) -> list[str]:
    """Of every number of bits and text: who has the least KL and perplexity in as many bytes."""
    said = []
    for key in [key for key in cells if key.startswith("teacher ") and key != "teacher dense"]:
        bits = key.split(" ")[1]
        same = {name: cell for name, cell in cells.items() if name.endswith(f" {bits}")}
        for text in texts:
            best = [min(same, key=lambda name, at=at: same[name]["scores"][text][at]) for at in (0, 1)]  # type: ignore[misc]
            said.append(f"On {text} at {bits} bits' bytes: perplexity {best[0]}, KL {best[1]}.")
    return said


def supers(cells: Cells) -> str:
    found = [
        [key.removeprefix("found "), weight["name"], f"[{weight['row']}, {weight['col']}]", weight["role"], f"{weight['output']:,.0f}"]
        for key, cell in cells.items() if key.startswith("found ")
        for weight in cell["weights"] or [{"name": "none", "row": "", "col": "", "role": "", "output": 0}]
    ]  # fmt: skip
    without = {key.removeprefix("without "): cell for key, cell in cells.items() if key.startswith("without ")}
    plain = [key for key in cells if key.startswith("plain ")]
    parts = [markdown(["model", "weight", "row, column", "role", "output"], found)]
    if without:
        text = next(iter(next(iter(without.values()))["scores"]))
        kls = {layer: cell["scores"][text][1] for layer, cell in without.items()}
        usual = statistics.median(kl for layer, kl in kls.items() if not without[layer]["role"])
        rows: list[list[str]] = [["any other (median)", "", f"{usual:.4f}"]]
        rows = [[layer, cell["role"], f"{kls[layer]:.4f}"] for layer, cell in without.items() if cell["role"]] + rows
        parts.append(markdown(["layer left out", "its super activation", f"KL on {text}"], rows))
        parts.append("All: " + ", ".join(f"{layer}: {kl:.3f}" for layer, kl in kls.items()))
    if plain:
        text = next(iter(cells[plain[0]]["restored"]))
        rows = [
            [f"{key.removeprefix('plain ')}, {kind}", *(f"{value:.4f}" for value in scores[text])]
            for key in plain for kind, scores in cells[key].items()
        ]  # fmt: skip
        parts.append(markdown(["plain 4 bits, a scale per row", f"cross entropy on {text}", "KL"], rows))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Cells], str]] = {"figure4": figure4, "table2": table2, "rival": rival, "super": supers}


def draw(cells: Cells, folder: Path) -> Path:
    """The curves of `figure4`, a panel for every text: means, and bands of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = names_of(cells)
    figure, panels = pyplot.subplots(
        1, len(texts), figsize=(5.2 * len(texts), 3.8), squeeze=False, layout="constrained"
    )
    for panel, text in zip(panels[0], texts, strict=True):
        for staging in STAGINGS:
            curves = [cell["curve"] for cell in of_seeds(cells, f"{text} {staging}")]
            if not curves:
                continue
            steps = [step for step, _ in curves[0]]
            columns = list(zip(*([loss for _, loss in curve] for curve in curves), strict=True))
            means = [statistics.mean(column) for column in columns]
            off = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
            panel.plot(steps, means, color=COLORS[staging], label=staging, marker=".", linewidth=1.6)
            low, high = ([mean + sign * d for mean, d in zip(means, off, strict=True)] for sign in (-1, 1))
            panel.fill_between(steps, low, high, color=COLORS[staging], alpha=0.15, linewidth=0)
        panel.set(title=text, xlabel="step", ylabel="held-out cross entropy, nats per token")
        panel.grid(alpha=0.3)
        panel.legend(title="teacher until", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "distillation.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
