"""A checkpoint as `inspect` shows it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from swquant.terminal.table import make_table, short_name, show_table
from swquant.units import human_bytes

__all__ = ["show_losses", "show_manifest", "show_schemes"]


def show_schemes(console: Console, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """One row per scheme and per reason for staying dense."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.get("stored_as") or f"dense: {tensor['dense']}", []).append(name)
    table = make_table(
        "Tensors", ("stored as", "left"), ("tensors", "right"), ("size", "right"), ("for example", "left")
    )
    for kind, names in kinds.items():
        size = sum(tensors[name]["bytes"] for name in names)
        table.add_row(escape(kind), str(len(names)), human_bytes(size), short_name(names[0]))
    show_table(console, table)


def _as_typed(options: Mapping[str, Any]) -> str:
    """Options as the command line takes them; those that change nothing are left out."""
    words: list[str] = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if key in ("symmetric", "restore"):
            off = {"symmetric": "--asymmetric", "restore": "--no-restore"}[key]
            words.append(flag if value else off)
        elif isinstance(value, bool):
            words += [flag] if value else []
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, item)]
        elif value not in (None, 0.0, "auto"):
            words += [flag, str(value)]
    return shlex.join(words)


def show_manifest(console: Console, path: Path, manifest: Mapping[str, Any]) -> None:
    """`inspect`: origin, totals, schemes, outliers, dense tensors and loaders."""
    totals, options = manifest["totals"], manifest["options"]
    console.print(
        f"[bold]{escape(str(path))}[/], made by swquant {manifest['swquant']} from {escape(manifest['source']['name'])} ({manifest['source']['kind']})"
    )
    console.print(
        f"{human_bytes(totals['bytes'])} on disk; {totals['quantized_weights']:,} of {totals['weights']:,} weights quantized, "
        f"{totals['bits_per_quantized_weight']:.3f} bits each with scales and outliers"
    )
    console.print(f"Options: {_as_typed(options)}", markup=False)
    show_schemes(console, manifest["tensors"])
    _show_outliers(console, manifest)
    show_losses(console, manifest)
    table = make_table("Loaders", ("loader", "left"), ("loads it?", "left"))
    for loader, verdict in manifest["loaders"].items():
        table.add_row(loader, escape(verdict))
    show_table(console, table)
    for note in manifest["notes"]:
        console.print(f"Note: {note}", markup=False)


def show_losses(console: Console, manifest: Mapping[str, Any]) -> None:
    """The tensors whose rounding cost most, as it was measured when they were compressed."""
    quantized = {name: tensor for name, tensor in manifest["tensors"].items() if "dense" not in tensor}
    table = make_table(
        "Tensors that lose most",
        ("tensor", "left"),
        ("stored as", "left"),
        ("error of output", "right"),
        ("of weight", "right"),
    )
    for name, tensor in sorted(quantized.items(), key=lambda item: -_lost(item[1]))[:5]:
        table.add_row(short_name(name), tensor["stored_as"], f"{_lost(tensor):.4f}", f"{tensor['relative_error']:.4f}")
    show_table(console, table)


def _lost(record: Mapping[str, Any]) -> float:
    """Expected relative error of a tensor's output; of the weight itself where the prompt did not reach it."""
    return float(record.get("output_error", record["relative_error"]))


def _show_outliers(console: Console, manifest: Mapping[str, Any]) -> None:
    weights = {(item["name"], item["row"], item["col"]): item for item in manifest["detection"]["super_weights"]}
    table = make_table(
        "Super weights",
        ("weight", "left"),
        ("row, col", "left"),
        ("value", "right"),
        ("without\nsidecar", "right"),
        ("KL if\npruned", "right"),
        ("kept in", "left"),
    )
    for (name, row, col), item in weights.items():
        tensor = manifest["tensors"].get(name, {})
        if "dense" in tensor or not tensor:
            without, kept = f"{item['value']:.5g}", "dense tensor"
        else:
            point = next(point for point in tensor["super_weights"] if (point["row"], point["col"]) == (row, col))
            without, kept = (
                f"{point['without_sidecar']:.5g}",
                "block, sidecar" if manifest["options"]["restore"] else "block",
            )
        table.add_row(short_name(name), f"{row}, {col}", f"{item['value']:.5g}", without, f"{item['kl']:.4g}", kept)
    if weights:
        show_table(console, table)
    else:
        console.print("No super weights were found.")
    count = sum(tensor.get("outliers", 0) for tensor in manifest["tensors"].values())
    console.print(f"The sidecar holds {count:,} original value{'' if count == 1 else 's'}.")
