"""The tables of benchmarks/continual.py: what its rows say, method by method, over orders and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["averages", "said_of", "table"]


def averages(result: Mapping[str, Any]) -> tuple[float, float, float]:
    """(mean loss of the texts, mean exact match of the formats, mean forgetting)."""
    final = result["final"]
    texts, formats = ([final[task] for task in result[kind]] for kind in ("texts", "formats"))
    loss = statistics.mean(item["loss"] for item in texts)
    exact = statistics.mean(item["exact"] for item in formats)
    return loss, exact, statistics.mean(result["forgotten"].values())


def said_of(result: Mapping[str, Any]) -> str:
    """A row in a line."""
    loss, exact, forgotten = averages(result)
    return f"loss {loss:.4f}, exact {exact:.1%}, forgotten {forgotten:+.4f}, {result['sets']} sets, {result['seconds']:.0f} s"


def table(results: Mapping[str, Any], methods: Sequence[str]) -> str:
    """In Markdown. results: "METHOD ORDER SEED" -> row."""
    lines = [
        "| method | perplexity of texts | exact match | forgotten, nats | sets | MB | auto finds the set | outside | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        rows = [row for key, row in sorted(results.items()) if key.split()[0] == method]
        if not rows:
            continue
        loss, exact, forgot = (list(column) for column in zip(*map(averages, rows), strict=True))
        auto = [statistics.mean(item["right"] for item in row["auto"].values()) for row in rows if "auto" in row]
        out = [row["outside"]["auto"] - row["outside"]["base"] for row in rows if "outside" in row]
        perplexities = [2.718281828459045**item for item in loss]
        lines.append(
            f"| {method} | {spread(perplexities, '.2f')} | {spread(exact, '.1%')} | {spread(forgot, '+.4f')} "
            f"| {spread([row['sets'] for row in rows], '.1f')} | {statistics.mean(row['bytes'] for row in rows) / 1e6:.1f} "
            f"| {spread(auto, '.1%')} | {spread([2.718281828459045**item - 1 for item in out], '+.2%')} "
            f"| {statistics.median(row['seconds'] for row in rows):.0f} |"
        )
    return "\n".join([*lines, "", *controls_of(results)])


def spread(values: list[float], form: str) -> str:
    """Mean, and the standard deviation of several."""
    if not values:
        return ""
    more = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{more}"


def controls_of(results: Mapping[str, Any]) -> Iterator[str]:
    """What the controls of the gradients' decisions say."""
    for key, row in sorted(results.items()):
        if "again" not in row:
            continue
        judged = [item for item in row["decisions"].values() if item["control"]]
        same = sum(item["control"].split(" ")[0] == item["action"] for item in judged)
        again = sum(item["action"] == "reuse" and item["set"] == item["own"] for item in row["again"].values())
        actions = ", ".join(f"{task} {item['action']} {item['set']}" for task, item in row["decisions"].items())
        yield (
            f"{key}: {actions}. Random spaces say the same in {same} of {len(judged)}; a task that comes again goes to its "
            f"own set in {again} of {len(row['again'])}; the opposite task: {row['opposite']['action']}."
        )
