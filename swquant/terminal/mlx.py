"""What a person sees of a folder for MLX that was written."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.terminal.text import marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.export.mlx.pipeline import MlxFolder

__all__ = ["show_mlx"]


def show_mlx(console: Console, result: MlxFolder) -> None:
    """What was done, in a few lines."""
    record = result.manifest
    for lost in record["left_out"]:
        console.print(sentence(f"Not in the folder: {lost}"), markup=False, soft_wrap=True)
    scheme = f"{record['bits']} bits in groups of {record['group_size']}"
    console.print(f"{record['quantized']} weights, most of them {scheme}; {record['dense']} tensors dense")
    path, quoted = (marked_sentence(text) for text in (str(result.path), shlex.quote(str(result.path))))
    console.print(f"[bold green]Wrote {path}[/]: {human_bytes(record['bytes'])} of weights.", soft_wrap=True)
    console.print(f"Next: mlx_lm.generate --model {quoted} --prompt TEXT", soft_wrap=True)
