"""A detection as a person sees it: super weights, cancellers, super activations, published coordinates."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from swquant.checkpoints.detection_schema import DetectionRecord, SuperWeightRecord
from swquant.terminal.table import make_table, short_name, show_table
from swquant.terminal.text import marked
from swquant.units import thousands

__all__ = ["show_detection", "token_name", "weights_table"]


def weights_table(title: str, weights: Iterable[SuperWeightRecord], scored: bool) -> Table:
    """Super weights or cancellers with their evidence; scored: with what pruning each would do."""
    numbers = ("value", "input", "output", "share", *(["KL if\npruned"] if scored else []))
    table = make_table(
        title, ("role", "left"), ("weight", "left"), ("row, col", "left"), *((key, "right") for key in numbers)
    )
    for weight in weights:
        table.add_row(
            marked(weight["role"]),
            short_name(weight["name"]),
            f"{weight['row']}, {weight['col']}",
            f"{weight['value']:.3g}",
            thousands(weight["input"]),
            thousands(weight["output"]),
            f"{weight['share']:.0%}",
            *([f"{weight['kl']:.3g}"] if scored else []),
        )
    return table


def token_name(record: DetectionRecord, index: int) -> str:
    """A token of the prompt as a cell shows it: its index and, where there is one, its text."""
    tokens = record["tokens"]
    return f"{index} {marked(repr(tokens[index]))}" if 0 <= index < len(tokens) else str(index)


def _show_unseen(console: Console, record: DetectionRecord) -> None:
    """What an empty list says nothing about."""
    if layers := record.get("unseen_layers"):
        numbers = ", ".join(map(str, layers))
        console.print(f"Not looked at: layer {numbers}, where swquant saw no product of a down projection.")
    if names := record.get("unseen"):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"Not looked at: {marked(names[0])}{more}, whose product this prompt does not reach.")


def show_detection(console: Console, name: str, record: DetectionRecord) -> None:
    """Super weights with their evidence, cancellers, super activations, and published coordinates if there are any."""
    weights = record["super_weights"]
    _show_unseen(console, record)
    if not weights:
        console.print(f"{marked(name)} has no super weight on this prompt.")
        for peak in sorted(record["layers"], key=lambda item: -item["output"])[:1]:
            console.print(
                f"The largest output of a down projection is {thousands(peak['output'])} (layer {peak['layer']}, channel "
                f"{peak['output_channel']})."
            )
    else:
        show_table(console, weights_table(f"Super weights of {marked(name)}", weights, scored=True))
    if record["cancellers"]:
        title = "Cancellers, which take the super activation away"
        show_table(console, weights_table(title, record["cancellers"], scored=False))
    if record["super_activations"]:
        table = make_table(
            "Super activations",
            ("channel", "right"),
            ("token", "left"),
            ("largest value", "right"),
            ("written by layer", "right"),
            ("until layer", "right"),
        )
        for item in record["super_activations"]:
            token = token_name(record, item["token"])
            until = "the end" if item["gone"] is None else str(item["gone"])
            table.add_row(str(item["channel"]), token, thousands(item["value"]), str(item["born"]), until)
        show_table(console, table)
    for entry in record["published"]:
        found = {(weight["layer"], weight["row"], weight["col"]) for weight in weights}
        listed = [tuple(point) for point in entry["coordinates"]]
        same = sum(point in found for point in listed)
        console.print(
            f"Published for {marked(entry['model'])}, which has this shape; {same} of {len(listed)} found here:"
        )
        for layer, row, col in listed:
            verdict = "found" if (layer, row, col) in found else "not found"
            console.print(f"  layer {layer} [{row}, {col}]  {verdict}", markup=False)
