"""What a person sees of a pool: the decisions and why, what training did, and the sets with their tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.adapt.pipeline import Adapted
    from swquant.adapt.plan import AdaptPlan
    from swquant.checkpoints.pool_schema import DecisionRecord
    from swquant.checkpoints.schema import CheckpointManifest

__all__ = ["show_adapt_plan", "show_adapted", "show_decisions", "show_pool"]


def show_adapt_plan(console: Console, plan: AdaptPlan) -> None:
    """What will be learned, and how large a set is."""
    options = plan.options
    tasks = ", ".join(f"{task.name} ({len(task.corpus)} windows)" for task in plan.tasks) or "none"
    console.print(sentence(f"Tasks for {plan.checkpoint.name}: {tasks}"), markup=False)
    console.print(
        sentence(
            f"A set has {plan.count:,} of {plan.of_blocks:,} blocks of {options.block} x {options.block}, "
            f"{human_bytes(plan.nbytes)}; policy {options.policy}, {options.steps} steps for each task"
        ),
        markup=False,
    )
    if plan.left_out:
        console.print(f"{len(plan.left_out)} rounded weights are not trained: experts, or products of their own")


def show_decisions(console: Console, decisions: Mapping[str, DecisionRecord]) -> None:
    """One table per task: what every set would lose, and what was decided."""
    for task, decision in decisions.items():
        if decision["sets"]:
            table = make_table(
                f"{marked(task)}: how much of its gradient each set would take",
                ("set", "left"),
                ("angle", "right"),
                ("by chance", "right"),
                ("beyond chance", "right"),
                ("threshold", "right"),
                ("random\nspaces", "right"),
                ("knows it", "right"),
                ("loss", "right"),
            )
            for name, item in decision["sets"].items():
                table.add_row(
                    marked(name), f"{item['angle']:.1f}°", f"{item['chance']:.1f}°", f"{item['excess']:.1%}",
                    f"{item['own_excess']:.1%}", f"{item['random_excess']:.1%}", f"{item['recognised']:.0%}",
                    f"{item['loss']:.4f}",
                )  # fmt: skip
            show_table(console, table)
        verb = "grows the set" if decision["action"] == "grow" else "reuses the set"
        control = f"; random spaces of the same ranks say {decision['control']}" if decision["control"] else ""
        console.print(
            f"[bold]{marked(task)}[/] {verb} [bold]{marked(decision['set'])}[/]: "
            f"{marked_sentence(decision['reason'] + control)}",
            soft_wrap=True,
        )


def show_adapted(console: Console, result: Adapted) -> None:
    """What was decided about the tasks of this run, and the pool as it is now."""
    pool = result.manifest.get("pool")
    if pool is not None:
        decisions = {task: pool["sets"][of_set]["tasks"][task]["decision"] for task, of_set in result.sets.items()}
        show_decisions(console, decisions)
    show_pool(console, result.manifest)
    console.print(f"Written to [bold]{marked_sentence(str(result.path))}[/]", soft_wrap=True)


def show_pool(console: Console, manifest: CheckpointManifest) -> None:
    """One row per task, by set."""
    pool = manifest.get("pool")
    if pool is None:
        return
    table = make_table(
        "Pool",
        ("set", "left"),
        ("bytes", "right"),
        ("task", "left"),
        ("came by", "left"),
        ("base", "right"),
        ("before", "right"),
        ("after", "right"),
        ("rate", "right"),
    )
    for name, record in pool["sets"].items():
        first = (marked(name), human_bytes(record["bytes"]))
        for task, item in record["tasks"].items():
            came = "reuse, unchanged" if item["kept"] else item["decision"]["action"]
            losses = (f"{item[key]:.4f}" for key in ("base", "before", "after"))
            table.add_row(*first, marked(task), came, *losses, f"{item['rate']:g}")
            first = ("", "")
    show_table(console, table)
    for pair, angle in pool["angles"].items():
        console.print(sentence(f"Between what {' and '.join(pair.split(' '))} see: {angle:.1f} degrees"), markup=False)
