"""What `eval` shows: perplexity, divergence, agreement and acceptance, in one short table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked

if TYPE_CHECKING:
    from swquant.evaluate.pipeline import Evaluation

__all__ = ["show_evaluation"]


def show_evaluation(console: Console, result: Evaluation) -> None:
    """One short table."""
    table = make_table("", ("measure", "left"), ("value", "right"))
    table.title = None
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.original_perplexity is not None:
        table.add_row("perplexity of the original", f"{result.original_perplexity:.4f}")
        table.add_row("KL divergence from the original (nats)", f"{result.kl:.5f}")
        table.add_row("top-1 agreement", f"{result.top1:.2%}")
        table.add_row("expected acceptance rate", f"{result.accepted:.2%}")
    table.add_row(
        "predicted tokens", f"{result.tokens:,} in {result.windows} window{'' if result.windows == 1 else 's'}"
    )
    if result.tasks is not None:
        table.add_row("answered by", ", ".join(f"{marked(task)} {count}" for task, count in result.tasks.items()))
    show_table(console, table)
