"""What `distill` shows: which layers went and what each is missed for, how the student compares, what it learned."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked_sentence, rates_tried
from swquant.units import human_bytes, short

if TYPE_CHECKING:
    from swquant.distill.pipeline import Distilled
    from swquant.distill.plan import DistillPlan
    from swquant.distill.teaching import Lesson

__all__ = ["plan_record", "show_distilled", "show_plan"]


def plan_record(plan: DistillPlan) -> dict[str, Any]:
    """The plan as JSON can hold it, for `--dry-run --json`."""
    return {
        "teacher": plan.teacher.name,
        "layers": len(plan.layers),
        "keep": None if plan.keep is None else list(plan.keep),
        "count": plan.count,
        "weights": plan.weights[1],
        "bytes": plan.nbytes[1],
        "text": None if plan.given is None else {"name": plan.given.name, "windows": len(plan.given)},
        "steps": plan.options.steps,
        "tokens": plan.tokens,
        "memory": plan.memory,
        "device": str(plan.device),
        "seconds": short(plan.seconds, 3),
    }


def show_plan(console: Console, plan: DistillPlan) -> None:
    """What would be done, in a few lines."""
    options, depth = plan.options, len(plan.layers)
    which = "those that are missed most" if plan.keep is None else options.layers
    before, after = (human_bytes(size) for size in plan.nbytes)
    console.print(f"{plan.count} of {depth} layers would stay, {which}: {before} of weights become about {after}.")
    if options.steps:
        read = f"what the teacher writes ({options.texts} windows)"
        if plan.given is not None:
            read = f"{marked_sentence(plan.given.name)} ({len(plan.given)} windows)"
        console.print(
            f"{options.steps} steps of {options.batch} x {options.window} tokens, {plan.tokens:,} in all, of {read}."
        )
    console.print(
        f"On {plan.device}: {human_bytes(plan.memory)} of memory, and at least {_time(plan.seconds)} for the steps."
        if options.steps
        else f"On {plan.device}: {human_bytes(plan.memory)} of memory."
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} seconds"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def show_distilled(console: Console, result: Distilled) -> None:
    """What was done, in a few lines and a table."""
    if result.measured is not None:
        together = dict(result.measured.order)
        table = make_table(
            "Layers left out, on the model's own text (KL in nats per token)",
            ("layer", "right"),
            ("alone", "right"),
            ("with those before", "right"),
            ("super activation", "left"),
            ("", "left"),
        )
        rows = [*together, *sorted(set(result.roles) - set(together))]
        for layer in rows:
            after = f"{together[layer]:.4f}" if layer in together else ""
            fate = "left out" if layer in together else "kept"
            table.add_row(str(layer), f"{result.measured.alone[layer]:.4f}", after, result.roles.get(layer, ""), fate)
        show_table(console, table)
    console.print(
        f"{len(result.keep)} of {result.depth} layers stay: {human_bytes(result.teacher_bytes)} of weights become "
        f"{human_bytes(result.nbytes)}. Logits differ by at most {result.difference:.3g} from the teacher's without these layers."
    )
    if result.lesson is not None:
        _show_lesson(console, result.lesson)
    console.print(f"[bold green]Wrote {marked_sentence(str(result.path))}[/].", soft_wrap=True)
    path = marked_sentence(shlex.quote(str(result.path)))
    console.print(f"Next: swquant eval {path} --text FILE   swquant compress {path}", soft_wrap=True)


def _show_lesson(console: Console, lesson: Lesson) -> None:
    steps = len(lesson.losses)
    stage = (
        "the teacher stayed to the end"
        if lesson.until >= steps
        else f"the teacher went after step {lesson.until}"
        if lesson.until
        else "without the teacher"
    )
    table = make_table("Held-out text (nats per token)", ("", "left"), ("before", "right"), ("after", "right"))
    table.add_row("cross entropy", f"{lesson.before[0]:.4f}", f"{lesson.after[0]:.4f}")
    table.add_row("KL from the teacher", f"{lesson.before[1]:.4f}", f"{lesson.after[1]:.4f}")
    console.print(f"Taught {steps} steps, {lesson.tokens:,} tokens of {marked_sentence(lesson.text)}; {stage}.")
    show_table(console, table)
    if lesson.tried:
        console.print(rates_tried(lesson.tried, lesson.rate))
    for look in lesson.looks:
        console.print(
            f"At step {look['step']} a look ahead: {look['taught']:.4f} with the teacher, {look['alone']:.4f} without."
        )
