"""What a person sees of a folder for MLX."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from swquant.checkpoints.schema import MlxManifest
from swquant.terminal.text import marked, marked_sentence, sentence
from swquant.units import human_bytes

if TYPE_CHECKING:
    from swquant.export.mlx.pipeline import MlxFolder

__all__ = ["show_mlx", "show_mlx_manifest"]


def _show_content(console: Console, manifest: MlxManifest) -> None:
    for lost in manifest["left_out"]:
        console.print(sentence(f"Not in the folder: {lost}"), markup=False, soft_wrap=True)
    scheme = f"{manifest['bits']} bits in groups of {manifest['group_size']}"
    console.print(f"{manifest['quantized']} weights, most of them {scheme}; {manifest['dense']} tensors dense")


def _show_next(console: Console, path: Path) -> None:
    console.print(
        f"Next: mlx_lm.generate --model {marked_sentence(shlex.quote(str(path)))} --prompt TEXT", soft_wrap=True
    )


def show_mlx(console: Console, result: MlxFolder) -> None:
    """What was done, in a few lines."""
    _show_content(console, result.manifest)
    size = human_bytes(result.manifest["totals"]["bytes"])
    console.print(f"[bold green]Wrote {marked_sentence(str(result.path))}[/]: {size}.", soft_wrap=True)
    _show_next(console, result.path)


def show_mlx_manifest(console: Console, path: Path, manifest: MlxManifest) -> None:
    """`inspect` of a folder for MLX: origin, size, schemes, what stayed behind."""
    console.print(
        f"[bold]{marked_sentence(str(path))}[/], for MLX, made by swquant {marked(manifest['swquant'])} from "
        f"{marked(manifest['compression']['source']['name'])}"
    )
    console.print(f"{human_bytes(manifest['totals']['bytes'])} on disk")
    _show_content(console, manifest)
    _show_next(console, path)
