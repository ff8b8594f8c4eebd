"""A plan as a person sees it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from swquant.compress.loaders import loader_table
from swquant.detect.record import detection_record
from swquant.terminal.detection import weights_table
from swquant.terminal.manifest import show_schemes
from swquant.terminal.table import make_table, short_name, show_table
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.compress.pipeline import Compressed
    from swquant.compress.writing import Prepared

__all__ = ["plan_record", "show_plan", "show_result"]


def plan_record(prepared: Prepared, target: Path) -> dict[str, Any]:
    """The plan as JSON can hold it, for `--dry-run --json`."""
    plan = prepared.plan
    return {
        "out": str(target),
        "options": plan.options.as_dict(),
        "detection": detection_record(prepared.found),
        "loaders": loader_table(plan),
        "bits_per_quantized_weight": round(plan.bits_per_weight, 4),
        "bytes": plan.nbytes,
        "source_bytes": plan.source_bytes,
        "notes": list(plan.notes),
        "left_out": dict(plan.left_out),
        "tensors": {
            tensor.name: {
                "shape": list(tensor.source.shape),
                "bytes": tensor.nbytes,
                **(
                    {"dense": tensor.reason}
                    if tensor.block is None
                    else {"stored_as": str(plan.scheme(tensor)), "block": str(tensor.block), "outliers": tensor.points}
                ),
            }
            for tensor in plan.tensors
        },
    }


def show_plan(console: Console, prepared: Prepared, target: Path, *, every_tensor: bool) -> None:
    """What will be done; with every_tensor one row each."""
    record = plan_record(prepared, target)
    weights = record["detection"]["super_weights"]
    if weights:
        show_table(console, weights_table(f"Super weights of {escape(prepared.checkpoint.name)}", weights, scored=True))
    else:
        console.print(f"{escape(prepared.checkpoint.name)} has no super weight on this prompt.")
    if every_tensor:
        table = make_table(
            "Plan",
            ("tensor", "left"),
            ("shape", "left"),
            ("stored as", "left"),
            ("outliers", "right"),
            ("size", "right"),
        )
        for name, tensor in record["tensors"].items():
            shape = "x".join(map(str, tensor["shape"]))
            stored = tensor.get("stored_as") or f"dense: {tensor['dense']}"
            table.add_row(
                short_name(name), shape, stored, str(tensor.get("outliers", "")), human_bytes(tensor["bytes"])
            )
        show_table(console, table)
    else:
        show_schemes(console, record["tensors"])
    for name, reason in record["left_out"].items():
        console.print(f"Left out: {name} ({reason})", markup=False)
    for note in record["notes"]:
        console.print(f"Note: {note}", markup=False)
    decoded = ", decoded to float32," if prepared.checkpoint.kind == "gguf" else ""
    console.print(
        f"{human_bytes(record['source_bytes'])} of weights{decoded} become {human_bytes(record['bytes'])}, "
        f"{record['bits_per_quantized_weight']:.3f} bits per quantized weight."
    )
    if every_tensor:
        console.print(
            f"Nothing was written; without --dry-run this would become {target}", markup=False, soft_wrap=True
        )


def show_result(console: Console, result: Compressed) -> None:
    """What was done, in a few lines."""
    totals = result.manifest["totals"]
    files = f"{human_bytes(totals['bytes'])} in {len(result.manifest['files'])} files, every byte verified"
    console.print(f"[bold green]Wrote {escape(str(result.path))}[/]: {files}.", soft_wrap=True)
    path = escape(shlex.quote(str(result.path)))
    console.print(f"Next: swquant inspect {path}   swquant eval {path} --text FILE", soft_wrap=True)
