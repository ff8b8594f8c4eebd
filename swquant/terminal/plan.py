"""A plan and its result as a person sees them: what will be done with every tensor, and what was."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swquant.terminal.detection import weights_table
from swquant.terminal.manifest import show_schemes
from swquant.terminal.table import make_table, short_name, show_table
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.compress.pipeline import Compressed
    from swquant.export.formats import Planned

__all__ = ["plan_record", "show_plan", "show_result"]


def plan_record(planned: Planned) -> dict[str, Any]:
    """The plan as JSON can hold it, for `--dry-run --json`."""
    from swquant.compress.loaders import loader_table  # here, not above: whoever inspects waits for no transformers
    from swquant.detect.record import detection_record

    prepared, plan = planned.prepared, planned.prepared.plan
    return {
        "out": str(planned.out),
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
                    else {
                        "stored_as": tensor.stored_as or str(plan.scheme(tensor)),
                        "block": str(tensor.block),
                        "outliers": tensor.outliers,
                    }
                ),
            }
            for tensor in plan.tensors
        },
        "format": planned.format.name,
        "export": None if planned.export is None else planned.export.as_dict(),
        "interrupted": planned.left or None,
    }


def show_plan(console: Console, planned: Planned, *, every_tensor: bool) -> None:
    """What will be done; with every_tensor one row each."""
    record, checkpoint = plan_record(planned), planned.prepared.checkpoint
    weights = record["detection"]["super_weights"]
    if weights:
        show_table(console, weights_table(f"Super weights of {marked(checkpoint.name)}", weights, scored=True))
    else:
        console.print(f"{marked(checkpoint.name)} has no super weight on this prompt.")
    stored = {
        name: tensor.get("stored_as") or f"dense: {tensor['dense']}" for name, tensor in record["tensors"].items()
    }
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
            table.add_row(
                short_name(name),
                shape,
                marked_sentence(stored[name]),
                str(tensor.get("outliers", "")),
                human_bytes(tensor["bytes"]),
            )
        show_table(console, table)
    else:
        show_schemes(console, ((name, stored[name], tensor["bytes"]) for name, tensor in record["tensors"].items()))
    for name, reason in record["left_out"].items():
        console.print(sentence(f"Left out: {name} ({reason})"), markup=False)
    for note in record["notes"]:
        console.print(sentence(f"Note: {note}"), markup=False)
    decoded = "" if checkpoint.stores_floats else ", decoded to float32,"
    console.print(
        f"{human_bytes(record['source_bytes'])} of weights{decoded} become {human_bytes(record['bytes'])}, "
        f"{record['bits_per_quantized_weight']:.3f} bits per quantized weight."
    )
    if every_tensor:
        if planned.left:
            console.print(sentence(f"Note: {planned.left}"), markup=False, soft_wrap=True)
        console.print(
            sentence(f"Nothing was written; without --dry-run this would become {planned.out}"),
            markup=False,
            soft_wrap=True,
        )


def show_result(console: Console, result: Compressed) -> None:
    """What was done, in a few lines."""
    totals = result.manifest["totals"]
    files = f"{human_bytes(totals['bytes'])} in {len(result.manifest['files'])} files, every byte verified"
    console.print(f"[bold green]Wrote {marked_sentence(str(result.path))}[/]: {files}.", soft_wrap=True)
    for loader, verdict in result.manifest["loaders"].items():
        if not verdict.startswith("yes"):
            console.print(sentence(f"{loader}: {verdict}"), markup=False, soft_wrap=True)
    path = marked_sentence(shlex.quote(str(result.path)))
    console.print(f"Next: swquant inspect {path}   swquant eval {path} --text FILE", soft_wrap=True)
