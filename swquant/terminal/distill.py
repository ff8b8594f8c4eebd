"""What `distill` shows: which layers went and what each is missed for, how the student compares, what it learned."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked_sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.distill.pipeline import Distilled
    from swquant.distill.teaching import Lesson

__all__ = ["show_distilled"]


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
    for look in lesson.looks:
        console.print(
            f"At step {look['step']} a look ahead: {look['taught']:.4f} with the teacher, {look['alone']:.4f} without."
        )
