"""What `push` shows: the files, their sizes, and where they are now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.table import make_table, show_table
from swquant.terminal.text import marked
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.push.pipeline import Pushed

__all__ = ["show_pushed"]


def show_pushed(console: Console, pushed: Pushed) -> None:
    """A row per file, and one line."""
    table = make_table("", ("file", "left"), ("size", "right"))
    table.title = None
    for name, size in pushed.files.items():
        table.add_row(marked(name), human_bytes(size))
    show_table(console, table)
    total = f"{len(pushed.files)} files, {human_bytes(sum(pushed.files.values()))}"
    if pushed.url is None:
        console.print(f"{total} would be sent to {marked(pushed.repository)}; nothing was", soft_wrap=True)
    else:
        console.print(f"{total} sent: {marked(pushed.url)}", soft_wrap=True)
