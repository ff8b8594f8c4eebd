"""What `doctor` shows: versions, devices, and how to mend what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked_sentence, sentence
from swquant.units import human_bytes

__all__ = ["show_doctor"]


def show_doctor(console: Console, report: Mapping[str, Any]) -> None:
    """Versions, devices, and how to mend what is missing."""
    console.print(f"swquant {report['swquant']}, Python {report['python']}, {report['platform']}")
    table = make_table("", ("package", "left"), ("version", "left"))
    table.title = None
    for name, version in {**report["packages"], **report["optional"]}.items():
        absent = "[yellow]not installed (optional)[/]" if name in report["optional"] else "[red]not installed[/]"
        if name == "vllm":  # `pip install vllm` here would take other versions of what swquant runs on
            absent = "[yellow]not here (optional, in an environment of its own)[/]"
        table.add_row(name, version or absent)
    show_table(console, table)
    console.print(f"Devices: {'; '.join(report['devices']) or 'none, without torch'}", markup=False)
    console.print(
        f"ONNX Runtime runs on: {report['provider'] or 'unknown, without onnxruntime and onnx'}", markup=False
    )
    operators = report["operators"]
    console.print(f"Operator library: {operators['library'] or 'none'}", markup=False, soft_wrap=True)
    if operators["problem"]:
        console.print(sentence(f"  {operators['problem']}: {operators['remedy']}"), markup=False, soft_wrap=True)
    if report["available_memory"]:
        console.print(f"Free memory: {human_bytes(report['available_memory'])}")
    for item in report["missing"]:
        problem = marked_sentence(item["problem"])
        console.print(
            f"[red]missing[/] {item['package']} ({problem}), needed for {item['for']}: pip install {item['package']}",
            soft_wrap=True,
        )
    if not report["missing"]:
        console.print("[green]Nothing is missing.[/]")
