"""Results as tables for people. Input is what `--json` prints, so both always say the same."""

from __future__ import annotations

import re

from rich import box
from rich.console import Console
from rich.table import Table

from swquant.terminal.text import marked

__all__ = ["make_table", "short_name", "show_table"]


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


def short_name(name: str) -> str:
    """model.layers.11.mlp.down_proj.weight -> 11.mlp.down_proj, as a cell holds it: an 80-column terminal must hold the
    whole table."""
    return marked(re.sub(r"^.*?\.(\d+\.)", r"\1", name.removesuffix(".weight"), count=1))
