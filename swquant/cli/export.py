"""`swquant export`: from a compressed checkpoint to an ONNX folder, a GGUF file or a folder for MLX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from swquant.cli.options import OUTPUT, takes
from swquant.cli.shared import CheckpointArgument, DeviceOption, JsonOption, TrustOption, make_progress, show_written
from swquant.export.formats import EXPORTS

__all__ = ["export"]

FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(EXPORTS),
        help="gguf where TARGET ends in .gguf, else onnx.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@takes(None, EXPORTS.values())
def export(
    checkpoint: CheckpointArgument,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder, or the .gguf file, to create.", show_default=False)
    ],
    form: FormatOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace TARGET if swquant made it.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    given: Mapping[str, Any],
) -> None:
    """Export a compressed checkpoint to ONNX, checked to give the same answers, a GGUF file for llama.cpp, or MLX."""
    from swquant.api import export as export_checkpoint

    result = export_checkpoint(
        checkpoint,
        target,
        format=form,
        overwrite=overwrite,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
        **given,
    )
    show_written(result, as_json)
