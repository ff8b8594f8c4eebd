"""`swquant export`: from a compressed checkpoint to an ONNX folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swquant.cli.shared import CheckpointArgument, JsonOption, TrustOption, make_progress, out, print_json
from swquant.declared import option_help
from swquant.export.onnx.options import ExportOptions

if TYPE_CHECKING:
    from swquant.export.onnx.pipeline import Exported

__all__ = ["AccuracyOption", "FormatOption", "GraphOption", "HeadOption", "PrecisionOption", "export", "show_exported"]

FormatOption = Annotated[
    str,
    typer.Option(
        "--format", help="checkpoint (for transformers and vLLM) or onnx (a folder for ONNX Runtime, see export)."
    ),
]


def _of_export(name: str) -> typer.models.OptionInfo:
    """An option of the export as `compress` takes it: none unless given."""
    return typer.Option(help=f"With --format onnx. {option_help(name, ExportOptions)}", show_default=False)


GraphOption = Annotated[str | None, _of_export("graph")]
PrecisionOption = Annotated[str | None, _of_export("precision")]
AccuracyOption = Annotated[int | None, _of_export("accuracy_level")]
HeadOption = Annotated[int | None, _of_export("lm_head_bits")]


def show_exported(result: Exported, as_json: bool) -> None:
    """Print what was exported."""
    from swquant.terminal.onnx import show_export

    if as_json:
        print_json({"path": str(result.path), "manifest": result.manifest})
    else:
        show_export(out, result)


def export(
    checkpoint: CheckpointArgument,
    out_folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to create.", show_default=False)],
    graph: Annotated[str, typer.Option(help=option_help("graph", ExportOptions))] = ExportOptions.graph,
    precision: Annotated[str, typer.Option(help=option_help("precision", ExportOptions))] = ExportOptions.precision,
    accuracy_level: Annotated[
        int | None, typer.Option(help=option_help("accuracy_level", ExportOptions), show_default=False)
    ] = None,
    lm_head_bits: Annotated[
        int, typer.Option(help=option_help("lm_head_bits", ExportOptions))
    ] = ExportOptions.lm_head_bits,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FOLDER if swquant made it.", show_default=False)
    ] = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Export a compressed checkpoint to ONNX, and check that it gives the same answers."""
    options = ExportOptions(graph, precision, accuracy_level, lm_head_bits)
    from swquant.api import export as export_folder

    result = export_folder(
        checkpoint,
        out_folder,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
        **options.as_dict(),
    )
    show_exported(result, as_json)
