"""A compressed checkpoint as `inspect` shows it: origin, schemes, outliers, losses, loaders."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from exporters.text import shown
from swquant.checkpoints.manifest import rounded, stored_as
from swquant.checkpoints.schema import CheckpointManifest, RoundedRecord
from swquant.compress.options import CompressOptions
from swquant.declared import flag
from swquant.terminal.adapt import show_pool
from swquant.terminal.table import make_table, short_name, show_table
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.terminal.tune import show_blocks
from swquant.units import human_bytes

__all__ = ["show_losses", "show_manifest", "show_schemes"]


def show_schemes(console: Console, tensors: Iterable[tuple[str, str, int]]) -> None:
    """One row per scheme and per reason for staying dense. tensors: (name, how it is stored, bytes)."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for name, kind, size in tensors:
        kinds.setdefault(kind, []).append((name, size))
    table = make_table(
        "Tensors", ("stored as", "left"), ("tensors", "right"), ("size", "right"), ("for example", "left")
    )
    for kind, members in kinds.items():
        size = sum(size for _, size in members)
        table.add_row(marked_sentence(kind), str(len(members)), human_bytes(size), short_name(members[0][0]))
    show_table(console, table)


def _as_typed(options: Mapping[str, object]) -> str:
    """Options as the command line takes them; those that change nothing are left out."""
    off = {item.name: item.metadata["off"] for item in fields(CompressOptions)}
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, bool):
            typed = key if value else off.get(key)
            words += [flag(typed)] if typed else []
        elif isinstance(value, list):
            words += [word for item in value for word in (flag(key), shown(item))]
        elif value not in (None, 0.0, "auto"):
            words += [flag(key), shown(value)]
    return shlex.join(words)


def show_manifest(console: Console, path: Path, manifest: CheckpointManifest) -> None:
    """`inspect`: origin, totals, schemes, outliers, dense tensors and loaders."""
    totals, options = manifest["totals"], manifest["options"]
    console.print(
        f"[bold]{marked_sentence(str(path))}[/], made by swquant {marked(manifest['swquant'])} from "
        f"{marked(manifest['source']['name'])} ({manifest['source']['kind']})"
    )
    console.print(
        f"{human_bytes(totals['bytes'])} on disk; {totals['quantized_weights']:,} of {totals['weights']:,} weights quantized, "
        f"{totals['bits_per_quantized_weight']:.3f} bits each with scales, outliers{' and blocks' if manifest.get('tuned') else ''}"
    )
    console.print(f"Options: {_as_typed(options)}", markup=False)
    show_schemes(console, ((name, stored_as(tensor), tensor["bytes"]) for name, tensor in manifest["tensors"].items()))
    _show_outliers(console, manifest)
    show_blocks(console, manifest)
    show_pool(console, manifest)
    show_losses(console, manifest)
    table = make_table("Loaders", ("loader", "left"), ("loads it?", "left"))
    for loader, verdict in manifest["loaders"].items():
        table.add_row(marked(loader), marked_sentence(verdict))
    show_table(console, table)
    for note in manifest["notes"]:
        console.print(sentence(f"Note: {note}"), markup=False)


def show_losses(console: Console, manifest: CheckpointManifest) -> None:
    """The tensors whose rounding cost most, as it was measured when they were compressed."""
    quantized = rounded(manifest["tensors"])
    table = make_table(
        "Tensors that lose most",
        ("tensor", "left"),
        ("stored as", "left"),
        ("error of output", "right"),
        ("of weight", "right"),
    )
    for name, tensor in sorted(quantized.items(), key=lambda item: -_lost(item[1]))[:5]:
        table.add_row(
            short_name(name), marked(tensor["stored_as"]), f"{_lost(tensor):.4f}", f"{tensor['relative_error']:.4f}"
        )
    show_table(console, table)


def _lost(record: RoundedRecord) -> float:
    """Expected relative error of a tensor's output; of the weight itself where the prompt did not reach it."""
    return record.get("output_error", record["relative_error"])


def _show_outliers(console: Console, manifest: CheckpointManifest) -> None:
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
    tensors = rounded(manifest["tensors"])
    seen = {
        (name, point["row"], point["col"]): point["without_sidecar"]
        for name, tensor in tensors.items()
        for point in tensor.get("super_weights", ())
    }
    for (name, row, col), item in weights.items():
        if name not in tensors:
            without, kept = f"{item['value']:.5g}", "dense tensor"
        else:
            without = f"{seen[name, row, col]:.5g}" if (name, row, col) in seen else ""
            kept = "block, sidecar" if manifest["options"]["restore"] else "block"
        table.add_row(short_name(name), f"{row}, {col}", f"{item['value']:.5g}", without, f"{item['kl']:.4g}", kept)
    if weights:
        show_table(console, table)
    else:
        console.print("No super weights were found.")
    count = sum(tensor["outliers"] for tensor in tensors.values())
    console.print(f"The sidecar holds {count:,} original value{'' if count == 1 else 's'}.")
