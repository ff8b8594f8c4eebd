"""The tables: methods, quality against bytes, pools, where the chosen blocks lie, and speed. They are made of the cells
that are there; half a run has half a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning.methods import METHODS
from tuning.results import Case, Cell, row_of, tried

__all__ = ["draw", "tables"]

BLOCKS = ("recovery", "gradient", "fisher")
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tables(cells: Mapping[str, Cell]) -> str:
    """Markdown of everything that the cells tell."""
    cases = list(dict.fromkeys(_case(cell) for cell in cells.values() if "rate" in cell))
    tasks = list(dict.fromkeys(case.task for case in cases))
    parts = [f"## {case.task}, {case.budget}, from {case.pool}\n\n{methods(cells, case)}" for case in cases]
    for task in tasks:
        parts += [budgets(cells, [case for case in cases if case.task == task])]
        parts += [pools(cells, [case for case in cases if case.task == task])]
    parts += [text for case in cases for method in BLOCKS if (text := places(cells, case, method))]
    return "\n\n".join(part for part in (*parts, speeds(cells)) if part)


def _case(cell: Cell) -> Case:
    return Case(cell["task"], cell["budget"], cell["pool"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: list[float], form: str = ".4f") -> str:
    """Mean, and the standard deviation of several."""
    if not values:
        return ""
    more = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{more}"


def _score(task: str) -> tuple[str, str, str]:
    """(what a task is scored with, its name, how it is written)."""
    if task == "recovery":
        return "kl", "KL on the test text", ".4f"
    return ("nll", "loss on held-out files", ".4f") if task == "python" else ("exact", "exact match", ".1%")


def methods(cells: Mapping[str, Cell], case: Case) -> str:
    """Each method at its own best rate: mean ± standard deviation over the seeds."""
    name, said, form = _score(case.task)
    start = cells.get(f"{case.task} before")
    head = ["method", "bytes", "rate", "seeds", "held-out loss", said, "WikiText-2 loss, change", "s per step", "MB"]
    rows = []
    if start:
        rows.append(
            ["before", "", "", "", f"{start['held_out']:.4f}", f"{start[name]:{form}}", f"{start['wiki']:.4f}", "", ""]
        )
    for method in METHODS:
        row = row_of(cells, case, method)
        if not row:
            continue
        rates, rate = tried(cells, case, method), row[0]["rate"]
        end = " (an end of what was tried)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        forgot = [cell["wiki"] - start["wiki"] for cell in row] if start else []
        peak = max(cell["peak"] for cell in row)
        rows.append([
            method, f"{row[0]['bytes']:,}", f"{rate:g}{end}", str(len(row)), _spread([cell["held_out"] for cell in row]),
            _spread([cell[name] for cell in row], form), _spread(forgot, "+.4f"),
            f"{statistics.median(cell['seconds'] for cell in row):.3f}", f"{peak / 1e6:,.0f}" if peak else "",
        ])  # fmt: skip
    return _table(head, rows)


def _across(cells: Mapping[str, Cell], cases: list[Case], names: list[str], title: str) -> str:
    """Methods down, cases across; of methods that have more than one."""
    name, said, form = _score(cases[0].task)
    rows = []
    for method in METHODS:
        row = [row_of(cells, case, method) for case in cases]
        if sum(map(bool, row)) > 1:
            text = [
                f"{_spread([cell[name] for cell in found], form)} ({found[0]['bytes'] / 1e6:.2f} MB)" if found else ""
                for found in row
            ]
            rows.append([method, *text])
    return f"## {title}: {said}\n\n{_table(['method', *names], rows)}" if rows else ""


def budgets(cells: Mapping[str, Cell], cases: list[Case]) -> str:
    """Quality against trained bytes (Figure 3 of the paper), from all layers."""
    sizes = [case for case in cases if case.pool == "all"]
    return _across(cells, sizes, [case.budget for case in sizes], f"{cases[0].task}, by budget") if sizes else ""


def pools(cells: Mapping[str, Cell], cases: list[Case]) -> str:
    """Attention, MLP or both at equal bytes (Table 4 of the paper)."""
    parts = []
    for budget in dict.fromkeys(case.budget for case in cases):
        same = [case for case in cases if case.budget == budget]
        title = f"{same[0].task}, {budget}, by layers that blocks are chosen from"
        parts.append(_across(cells, same, [case.pool for case in same], title))
    return "\n\n".join(part for part in parts if part)


def places(cells: Mapping[str, Cell], case: Case, method: str) -> str:
    """Where the chosen blocks lie (Figures 4 and 5 of the paper): their share by kind, beside the kind's share of all
    blocks, and how many in each third of the layers; means over the seeds."""
    seeds = [cell["places"] for cell in row_of(cells, case, method) if "places" in cell]
    if not seeds:
        return ""
    kinds = sorted(seeds[0], key=lambda kind: (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind))
    layers = 1 + max(int(layer) for kind in kinds for layer in seeds[0][kind])
    totals = [_sum(cells_of, range(layers)) for cells_of in seeds[0].values()]
    chosen, every = (sum(total[side] for total in totals) for side in (0, 1))
    rows = []
    for kind in kinds:
        found = [_sum(places[kind], range(layers)) for places in seeds]
        thirds = [
            statistics.mean(
                _sum(places[kind], range(layers * third // 3, layers * (third + 1) // 3))[0] for places in seeds
            )
            for third in range(3)
        ]
        share, of_all = statistics.mean(item[0] for item in found) / max(chosen, 1), found[0][1] / every
        rows.append(
            [kind, f"{share:.1%}", f"{of_all:.1%}", f"{share / of_all:.2f}", *(f"{item:.0f}" for item in thirds)]
        )
    head = ["kind", "share of the chosen", "share of all blocks", "ratio", "first third", "second", "last"]
    return f"## {case.task}, {case.budget}, from {case.pool}: where {method} lies\n\n{_table(head, rows)}"


def _sum(layers: Mapping[str, list[int]], of: range) -> tuple[int, int]:
    """(chosen, all) of some layers."""
    inside = [pair for layer, pair in layers.items() if int(layer) in of]
    return sum(pair[0] for pair in inside), sum(pair[1] for pair in inside)


def speeds(cells: Mapping[str, Cell]) -> str:
    """Table 1 of the paper."""
    found = [cell for cell in cells.values() if "precision" in cell and cell["seconds"]]
    parts = []
    for budget, precision in dict.fromkeys((cell["budget"], cell["precision"]) for cell in found):
        same = [cell for cell in found if (cell["budget"], cell["precision"]) == (budget, precision)]
        rows: dict[str, Any] = {cell["method"]: cell for cell in same}
        head = ["method", "parameters", "ms per step", "MB", "× LoRA's steps", "× SHiRA's steps"]
        lines = [
            [
                method, f"{cell['parameters']:,}", f"{1000 * cell['seconds']:.1f}",
                f"{cell['peak'] / 1e6:,.0f}" if cell["peak"] else "",
                *(f"{rows[other]['seconds'] / cell['seconds']:.2f}" if other in rows else "" for other in ("lora", "shira")),
            ]
            for method, cell in rows.items()
        ]  # fmt: skip
        parts.append(f"## Speed, {budget}, {precision}\n\n{_table(head, lines)}")
    return "\n\n".join(parts)


def draw(cells: Mapping[str, Cell], folder: Path, name: str) -> list[Path]:
    """Quality against trained bytes, a chart of every task with methods of several budgets: means, and bars of one
    standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [
        case for case in dict.fromkeys(_case(cell) for cell in cells.values() if "rate" in cell) if case.pool == "all"
    ]
    drawn = []
    for task in dict.fromkeys(case.task for case in cases):
        score, said, _ = _score(task)
        figure, axes = pyplot.subplots(figsize=(5.6, 3.8), layout="constrained")
        for method in METHODS:
            rows = [row for case in cases if case.task == task and (row := row_of(cells, case, method))]
            if len(rows) < 2:
                continue
            points = sorted((row[0]["bytes"] / 1e6, [cell[score] for cell in row]) for row in rows)
            off = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            means = [statistics.mean(values) for _, values in points]
            axes.errorbar([size for size, _ in points], means, off, label=method, marker=".", capsize=3, linewidth=1.6)
        if axes.has_data():
            axes.set(xscale="log", xlabel="trained, MB at 16 bits", ylabel=said, title=f"{name}, {task}")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            folder.mkdir(parents=True, exist_ok=True)
            drawn.append(folder / f"tuning-{name}-{task}.png")
            figure.savefig(drawn[-1], dpi=150)
        pyplot.close(figure)
    return drawn
