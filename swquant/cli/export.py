"""`swquant export`: from a compressed checkpoint to an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swquant.cli.options import OUTPUT, takes
from swquant.cli.shared import CheckpointArgument, JsonOption, TrustOption, make_progress, show_written
from swquant.export.onnx.options import ExportOptions

__all__ = ["export"]


@takes(ExportOptions)
def export(
    checkpoint: CheckpointArgument,
    out_folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FOLDER if swquant made it.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    *,
    options: ExportOptions,
) -> None:
    """Export a compressed checkpoint to ONNX, and check that it gives the same answers."""
    from swquant.api import export as export_checkpoint

    result = export_checkpoint(
        checkpoint,
        out_folder,
        options,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    show_written(result, as_json)
