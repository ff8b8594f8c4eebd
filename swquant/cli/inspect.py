"""`swquant inspect`: what is in a compressed checkpoint."""

from __future__ import annotations

from swquant.cli.shared import CheckpointArgument, JsonOption, out, print_json

__all__ = ["inspect"]


def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Show what is in a compressed checkpoint: schemes, outliers, what stayed dense and why, what loads it."""
    from swquant.api import inspect as read_manifest
    from swquant.terminal.formats import view_of

    manifest = read_manifest(checkpoint)
    if as_json:
        print_json(manifest)
    else:
        show = view_of(manifest).inspected
        assert show is not None, "only what has a folder has a manifest"
        show(out, checkpoint, manifest)
