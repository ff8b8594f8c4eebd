"""From what was asked of `compress` to what MLX holds: real offsets, nothing beside the codes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from exporters.errors import SwquantError

if TYPE_CHECKING:
    from swquant.compress.options import CompressOptions

__all__ = ["suited"]


def suited(options: CompressOptions) -> CompressOptions:
    """The options as MLX holds them best: real offsets, no sidecar. Raises SwquantError for what it cannot hold."""
    for unheld, what in (
        (options.outliers, f"--outliers {options.outliers}: MLX has no place for weights beside its groups"),
        (options.activations != "none", f"--activations {options.activations}: MLX computes with float inputs"),
        (not options.symmetric, "--asymmetric: MLX has real offsets instead of zero points (--offsets float)"),
        (options.offsets == "byte", "--offsets byte: MLX stores offsets as floats (--offsets float)"),
    ):
        if unheld:
            raise SwquantError(f"{what}; leave it out")
    return replace(options.suiting("float"), outliers=None, restore=False)
