"""What `moe` shows: which layers get how many experts, what that costs, and what training did."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked, marked_sentence, rates_tried
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.moe.pipeline import Mixed
    from swquant.moe.plan import MoePlan

__all__ = ["mixed_record", "plan_record", "show_mixed", "show_plan"]


def plan_record(plan: MoePlan) -> dict[str, Any]:
    """The plan as JSON can hold it, for `--dry-run --json`."""
    return {
        "model": plan.checkpoint.name,
        "dense": plan.weights,
        "weights": plan.total,
        "active": plan.active,
        "bytes": plan.nbytes,
        "mixtures": [
            {"layer": item.layer, "module": item.module, "experts": item.experts, "size": item.size}
            for item in plan.mixtures
        ],
    }


def mixed_record(result: Mixed) -> dict[str, Any]:
    """The result as JSON can hold it."""
    return {"path": str(result.path), **plan_record(result.plan), **result.record}


def show_plan(console: Console, plan: MoePlan) -> None:
    """A row for every mixture, and what they cost together."""
    table = make_table(
        f"Mixtures of {marked(plan.checkpoint.name)}",
        ("layer", "right"),
        ("experts", "right"),
        ("neurons each", "right"),
        ("of the MLP's", "right"),
        ("beside the MLP", "left"),
    )
    for item in plan.mixtures:
        beside = "yes" if plan.options.residual else "no"
        table.add_row(str(item.layer), str(item.experts), str(item.size), f"{item.neurons}", beside)
    show_table(console, table)
    console.print(
        f"{plan.weights:,} weights become {plan.total:,} ({human_bytes(plan.nbytes)}); a token meets {plan.active:,}, "
        f"with {plan.options.top} of the experts."
    )


def show_mixed(console: Console, result: Mixed) -> None:
    """What was done, in a few lines."""
    console.print(
        f"Before training, its logits differ by at most {result.difference:.3g} from the dense model's, in float32."
    )
    if (course := result.course) is not None:
        console.print(
            f"Trained {course.parameters:,} weights on {course.tokens:,} tokens: held-out cross entropy "
            f"{course.before:.4f} -> {course.after:.4f}; {course.dropped:.1%} of the tokens found their expert full."
        )
        table = make_table("Held-out tokens by expert", ("layer", "right"), ("shares", "left"))
        for item, shares in zip(result.plan.mixtures, course.shares, strict=True):
            table.add_row(str(item.layer), " ".join(f"{share:.0%}" for share in shares))
        show_table(console, table)
        if course.tried:
            console.print(rates_tried(course.tried, course.rate))
    console.print(f"[bold green]Wrote {marked_sentence(str(result.path))}[/].", soft_wrap=True)
    path = marked_sentence(shlex.quote(str(result.path)))
    loaders = (
        "Stock transformers and vLLM load it, as Qwen2-MoE."
        if result.plan.options.stock
        else "Only swquant loads it, or transformers with trust_remote_code."
    )
    console.print(
        f"{loaders}\nNext: swquant eval {path} --text FILE   swquant compress {path}",
        soft_wrap=True,
    )
