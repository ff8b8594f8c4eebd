"""What a person sees of a merge: which sets became codes, and what that cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked_sentence, sentence

if TYPE_CHECKING:
    from swquant.merge.pipeline import Merged

__all__ = ["show_merged"]


def show_merged(console: Console, result: Merged) -> None:
    """What came of it."""
    if result.record is None or result.manifest is None:
        console.print(f"Written to [bold]{marked_sentence(str(result.path))}[/], the whole model", soft_wrap=True)
        return
    record, totals = result.record, result.manifest["totals"]
    console.print(
        sentence(
            f"{', '.join(record['sets'])} became part of the codes of {record['tensors']} tensors; "
            f"{totals['bits_per_quantized_weight']:.3f} bits per rounded weight"
        ),
        markup=False,
    )
    console.print(
        sentence(
            f"KL to the tuned model, on text of its own: {record['kl_without']:.4f} for those who ignored the sidecar, "
            f"{record['kl_merged']:.4f} merged"
        ),
        markup=False,
    )
    if result.evaluation:
        table = make_table(
            "On the text", ("", "left"), ("without patches", "right"), ("with them", "right"), ("merged", "right")
        )
        for key, values in result.evaluation.items():
            table.add_row(key, *(f"{value:.4f}" for value in values))
        show_table(console, table)
    console.print(f"Written to [bold]{marked_sentence(str(result.path))}[/]", soft_wrap=True)
