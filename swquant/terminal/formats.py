"""What a person sees of each kind of result: a row for each format, as `export.formats` has one for writing it, and one
for patches alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swquant.terminal.activations import show_activations
from swquant.terminal.gguf import show_gguf
from swquant.terminal.manifest import show_losses, show_manifest
from swquant.terminal.mlx import show_mlx, show_mlx_manifest
from swquant.terminal.onnx import show_export, show_onnx_manifest
from swquant.terminal.plan import show_result
from swquant.terminal.tune import show_patches, show_tuned

if TYPE_CHECKING:
    from swquant.checkpoints.schema import CheckpointManifest, Manifest
    from swquant.export.gguf.pipeline import GgufRecord

__all__ = ["VIEWS", "View", "view_of"]


@dataclass(frozen=True)
class View:
    """written: what was done. inspected: what is in a folder. losses: which tensors lose most, where that is known."""

    written: Callable[[Console, Any], None]
    inspected: Callable[[Console, Path, Any], None] | None
    losses: Callable[[Console, Any], None] | None


def _show_checkpoint(console: Console, path: Path, manifest: CheckpointManifest) -> None:
    show_manifest(console, path, manifest)
    show_activations(console, manifest)


VIEWS = {
    "checkpoint": View(show_result, _show_checkpoint, show_losses),
    "onnx": View(show_export, show_onnx_manifest, None),
    "gguf": View(show_gguf, None, None),
    "mlx": View(show_mlx, show_mlx_manifest, None),
    "patches": View(show_tuned, show_patches, None),
}


def view_of(manifest: Manifest | GgufRecord) -> View:
    """The row of what a manifest describes."""
    return VIEWS[str(manifest.get("kind", "checkpoint"))]
