"""Results as tables for people. Input is what `--json` prints, so both always say the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swquant.console import human_bytes
from swquant.manifest import detection_record, loader_table

if TYPE_CHECKING:
    from swquant.evaluation import Evaluation
    from swquant.pipeline import Compressed, Prepared

__all__ = [
    "make_table",
    "plan_record",
    "show_detection",
    "show_doctor",
    "show_evaluation",
    "show_losses",
    "show_manifest",
    "show_plan",
    "show_result",
    "show_table",
]


def make_table(title: str, *columns: tuple[str, str]) -> Table:
    """A table with (heading, justification) columns. Names may be broken over lines, numbers and coordinates never."""
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for heading, justify in columns:
        whole = justify == "right" or heading in ("role", "row, col")
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=whole)  # type: ignore[arg-type]
    return table


def show_table(console: Console, table: Table) -> None:
    """Print a table; a window of under 80 columns breaks its lines rather than losing their ends."""
    if console.width < 80:
        table.width = 80
    console.print(table, crop=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(name: str) -> str:
    """model.layers.11.mlp.down_proj.weight -> 11.mlp.down_proj: an 80-column terminal must hold the whole table."""
    return re.sub(r"^.*?\.(\d+\.)", r"\1", name.removesuffix(".weight"), count=1)


def _weights_table(title: str, weights: Iterable[Mapping[str, Any]], scored: bool) -> Table:
    numbers = ("value", "input", "output", "share", *(["KL if\npruned"] if scored else []))
    table = make_table(
        title, ("role", "left"), ("weight", "left"), ("row, col", "left"), *((key, "right") for key in numbers)
    )
    for weight in weights:
        table.add_row(
            weight["role"],
            _short(weight["name"]),
            f"{weight['row']}, {weight['col']}",
            f"{weight['value']:.3g}",
            _number(weight["input"]),
            _number(weight["output"]),
            f"{weight['share']:.0%}",
            *([f"{weight['kl']:.3g}"] if scored else []),
        )
    return table


def show_detection(console: Console, name: str, record: Mapping[str, Any]) -> None:
    """Super weights with their evidence, cancellers, super activations, and the published coordinates if there are any."""
    weights = record["super_weights"]
    if not weights:
        console.print(f"{escape(name)} has no super weight on this prompt.")
        for peak in sorted(record["layers"], key=lambda item: -item["output"])[:1]:
            console.print(
                f"The largest output of a down projection is {_number(peak['output'])} (layer {peak['layer']}, channel "
                f"{peak['output_channel']})."
            )
    else:
        show_table(console, _weights_table(f"Super weights of {escape(name)}", weights, scored=True))
    if record["cancellers"]:
        title = "Cancellers, which take the super activation away"
        show_table(console, _weights_table(title, record["cancellers"], scored=False))
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
            token = f"{item['token']} {escape(repr(record['tokens'][item['token']]))}"
            until = "the end" if item["gone"] is None else str(item["gone"])
            table.add_row(str(item["channel"]), token, _number(item["value"]), str(item["born"]), until)
        show_table(console, table)
    for entry in record["published"]:
        found = {(weight["layer"], weight["row"], weight["col"]) for weight in weights}
        listed = [tuple(point) for point in entry["coordinates"]]
        same = sum(point in found for point in listed)
        console.print(f"Published for {entry['model']}, which has this shape; {same} of {len(listed)} found here:")
        for layer, row, col in listed:
            verdict = "found" if (layer, row, col) in found else "not found"
            console.print(f"  layer {layer} [{row}, {col}]  {verdict}", markup=False)


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
        show_table(
            console, _weights_table(f"Super weights of {escape(prepared.checkpoint.name)}", weights, scored=True)
        )
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
            table.add_row(_short(name), shape, stored, str(tensor.get("outliers", "")), human_bytes(tensor["bytes"]))
        show_table(console, table)
    else:
        _show_schemes(console, record["tensors"])
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


def _show_schemes(console: Console, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """One row per scheme and per reason for staying dense."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(tensor.get("stored_as") or f"dense: {tensor['dense']}", []).append(name)
    table = make_table(
        "Tensors", ("stored as", "left"), ("tensors", "right"), ("size", "right"), ("for example", "left")
    )
    for kind, names in kinds.items():
        size = sum(tensors[name]["bytes"] for name in names)
        table.add_row(escape(kind), str(len(names)), human_bytes(size), _short(names[0]))
    show_table(console, table)


def show_result(console: Console, result: Compressed) -> None:
    """What was done, in a few lines."""
    totals = result.manifest["totals"]
    files = f"{human_bytes(totals['bytes'])} in {len(result.manifest['files'])} files, every byte verified"
    console.print(f"[bold green]Wrote {escape(str(result.path))}[/]: {files}.", soft_wrap=True)
    path = escape(shlex.quote(str(result.path)))
    console.print(f"Next: swquant inspect {path}   swquant eval {path} --text FILE", soft_wrap=True)


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
    _show_schemes(console, manifest["tensors"])
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
        table.add_row(_short(name), tensor["stored_as"], f"{_lost(tensor):.4f}", f"{tensor['relative_error']:.4f}")
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
        table.add_row(_short(name), f"{row}, {col}", f"{item['value']:.5g}", without, f"{item['kl']:.4g}", kept)
    if weights:
        show_table(console, table)
    else:
        console.print("No super weights were found.")
    count = sum(tensor.get("outliers", 0) for tensor in manifest["tensors"].values())
    console.print(f"The sidecar holds {count:,} original value{'' if count == 1 else 's'}.")


def show_evaluation(console: Console, result: Evaluation) -> None:
    """One short table."""
    table = make_table("", ("measure", "left"), ("value", "right"))
    table.title = None
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.original_perplexity is not None:
        table.add_row("perplexity of the original", f"{result.original_perplexity:.4f}")
        table.add_row("KL divergence from the original (nats)", f"{result.kl:.5f}")
        table.add_row("top-1 agreement", f"{result.top1:.2%}")
    table.add_row(
        "predicted tokens", f"{result.tokens:,} in {result.windows} window{'' if result.windows == 1 else 's'}"
    )
    show_table(console, table)


def show_doctor(console: Console, report: Mapping[str, Any]) -> None:
    """Versions, devices, and how to mend what is missing."""
    console.print(f"swquant {report['swquant']}, Python {report['python']}, {report['platform']}")
    table = make_table("", ("package", "left"), ("version", "left"))
    table.title = None
    for name, version in {**report["packages"], **report["optional"]}.items():
        absent = "[yellow]not installed (optional)[/]" if name in report["optional"] else "[red]not installed[/]"
        table.add_row(name, version or absent)
    show_table(console, table)
    console.print(f"Devices: {'; '.join(report['devices']) or 'none, without torch'}", markup=False)
    console.print(
        f"ONNX Runtime runs on: {report['provider'] or 'unknown, without onnxruntime and onnx'}", markup=False
    )
    operators = report["operators"]
    console.print(f"Operator library: {operators['library'] or 'none'}", markup=False, soft_wrap=True)
    if operators["problem"]:
        console.print(f"  {operators['problem']}: {operators['remedy']}", markup=False, soft_wrap=True)
    if report["available_memory"]:
        console.print(f"Free memory: {human_bytes(report['available_memory'])}")
    for item in report["missing"]:
        problem = escape(item["problem"])
        console.print(
            f"[red]missing[/] {item['package']} ({problem}), needed for {item['for']}: pip install {item['package']}",
            soft_wrap=True,
        )
    if not report["missing"]:
        console.print("[green]Nothing is missing.[/]")
