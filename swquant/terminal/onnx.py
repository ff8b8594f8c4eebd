"""What a person sees of an ONNX folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.checkpoints.onnx_schema import CheckRecord, NodeRecord
from swquant.checkpoints.schema import OnnxManifest
from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.export.onnx.pipeline import Exported

__all__ = ["show_export", "show_onnx_manifest"]


def _show_nodes(console: Console, manifest: OnnxManifest) -> None:
    kinds: dict[str, list[NodeRecord]] = {}
    for weight in manifest["weights"].values():
        offsets = ", offsets" if weight.get("offsets") else ""
        kind = f"{weight['operator']}, {weight['bits']} bits, block {weight['block']}{offsets}"
        kinds.setdefault(kind, []).append(weight)
    nodes = make_table(
        "Quantized linears", ("node", "left"), ("nodes", "right"), ("outliers", "right"), ("size", "right")
    )
    for kind, weights in sorted(kinds.items()):
        outliers = sum(weight["outliers"] for weight in weights)
        nodes.add_row(
            marked(kind), str(len(weights)), str(outliers), human_bytes(sum(weight["bytes"] for weight in weights))
        )
    show_table(console, nodes)


def _check_lines(check: CheckRecord) -> list[str]:
    lines = [
        f"Checked on {check['runtime']}{' and with the operator library' if check['operator_library'] else ''}: logits within {check['largest_difference']:.2g} of their range, "
        f"{check['same_tokens']} of {check['generated_tokens']} greedy tokens the same"
    ]
    if "long_tokens" in check:
        lines.append(f"Also checked on {check['long_tokens']} tokens, past a length at which its arithmetic changes")
    if "unreached" in check:
        lengths = " and ".join(map(str, check["unreached"]))
        lines.append(f"Not checked on more than {lengths} tokens, where its arithmetic changes: it would take too long")
    if check["without_outliers"] is not None:
        lines.append(f"Without the restored outliers the logits would differ by {check['without_outliers']:.2g}")
    lines.append("Nodes: " + ", ".join(f"{count} on {name}" for name, count in check["providers"].items()))
    return lines


def show_export(console: Console, result: Exported) -> None:
    """What was done, in a few lines."""
    _show_nodes(console, result.manifest)
    for line in _check_lines(result.manifest["check"]):
        console.print(sentence(line), markup=False)
    size = human_bytes(result.manifest["totals"]["bytes"])
    console.print(f"[bold green]Wrote {marked_sentence(str(result.path))}[/]: {size}.", soft_wrap=True)
    path = marked_sentence(shlex.quote(str(result.path)))
    console.print(f"Next: swquant generate {path} PROMPT   swquant eval {path} --text FILE", soft_wrap=True)


def show_onnx_manifest(console: Console, path: Path, manifest: OnnxManifest) -> None:
    """`inspect` of an ONNX folder: origin, nodes, check, operators."""
    options = manifest["options"]
    console.print(
        f"[bold]{marked_sentence(str(path))}[/], ONNX, made by swquant {marked(manifest['swquant'])} from "
        f"{marked(manifest['source']['name'])}"
    )
    console.print(
        f"{human_bytes(manifest['totals']['bytes'])} on disk; graph of {marked(options['graph'])}, {marked(options['precision'])}, "
        f"accuracy level {options['accuracy_level']}"
    )
    _show_nodes(console, manifest)
    for line in _check_lines(manifest["check"]):
        console.print(sentence(line), markup=False)
    operators = ", ".join(f"{count} {name}" for name, count in manifest["operators"].items())
    console.print(sentence(f"Operators: {operators}"), markup=False)
