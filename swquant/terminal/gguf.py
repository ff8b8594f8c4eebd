"""What a person sees of a GGUF file that was written: its types, what it holds of super weights, what it lacks."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.export.gguf.pipeline import Written

__all__ = ["show_gguf"]


def show_gguf(console: Console, result: Written) -> None:
    """What was done, in a few lines."""
    record = result.manifest
    types = ", ".join(f"{count} {name}" for name, count in record["types"].items())
    if record["super_weights"]:
        table = make_table(
            "Super weights", ("tensor", "left"), ("place", "right"), ("value", "right"), ("in the file", "right")
        )
        for weight in record["super_weights"]:
            place = f"{weight['row']}, {weight['col']}"
            held = f"{weight['without_sidecar']:.6g}"
            table.add_row(marked(weight["tensor"]), place, f"{weight['value']:.6g}", held)
        show_table(console, table)
    for lost in record["left_out"]:
        console.print(sentence(f"Not in the file: {lost}"), markup=False, soft_wrap=True)
    console.print(sentence(f"Tensors of {record['architecture']}: {types}"), markup=False, soft_wrap=True)
    path = marked_sentence(str(result.path))
    console.print(
        f"[bold green]Wrote {path}[/]: {human_bytes(record['bytes'])}, every byte read again.", soft_wrap=True
    )
    quoted = marked_sentence(shlex.quote(str(result.path)))
    console.print(f"Next: llama-cli -m {quoted}   swquant eval {quoted} --text FILE", soft_wrap=True)
