"""`swquant compress`: the main job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swquant.cli.options import OTHER, OUTPUT, takes
from swquant.cli.recipe import LikeOption, RecipeOption
from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    LowMemoryOption,
    MemoryOption,
    TrustOption,
    make_progress,
    out,
    print_json,
    show_written,
)
from swquant.compress.options import CompressOptions
from swquant.export.formats import FORMATS

if TYPE_CHECKING:
    from swquant.export.formats import Planned

__all__ = ["compress"]

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a .gguf file or a hub id (OWNER/NAME).", show_default=False
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        help=f"{', '.join(f'{row.name} ({row.text})' for row in FORMATS.values())}.",
        rich_help_panel=OUTPUT,
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option("--fresh", help="Start over, where an interrupted run would be gone on with.", rich_help_panel=OUTPUT),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", help="Processes that round tensors, by Ray.", rich_help_panel=OTHER),
]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster whose workers round tensors.", rich_help_panel=OTHER),
]


@takes(CompressOptions, FORMATS.values())
def compress(
    model: SourceArgument,
    out_folder: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="What to create; <name>-w4-b128 by default.", show_default=False),
    ] = None,
    recipe: RecipeOption = None,
    like: LikeOption = None,
    form: FormatOption = "checkpoint",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be done, tensor by tensor; write nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint already.", rich_help_panel=OUTPUT)
    ] = False,
    fresh: FreshOption = False,
    workers: WorkersOption = None,
    ray: RayOption = None,
    as_json: JsonOption = False,
    low_memory: LowMemoryOption = False,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    options: CompressOptions,
    given: Mapping[str, Any],
) -> None:
    """Compress MODEL into OUT, a checkpoint for transformers and vLLM, or at once what ONNX, llama.cpp or MLX run."""
    from swquant.api import compress as compress_model
    from swquant.api import plan
    from swquant.terminal.plan import plan_record, show_plan

    def show(planned: Planned) -> None:
        if not as_json:
            show_plan(out, planned, every_tensor=dry_run)
        elif dry_run:
            print_json(plan_record(planned))

    how: dict[str, Any] = {
        "format": form,
        "low_memory": low_memory,
        "memory": memory,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "progress": make_progress(as_json),
        **given,
    }
    if dry_run:
        show(plan(model, out_folder, options, **how))
    else:
        how |= {"overwrite": overwrite, "fresh": fresh, "workers": workers, "ray": ray, "on_plan": show}
        result = compress_model(model, out_folder, options, **how)
        show_written(result, as_json)
