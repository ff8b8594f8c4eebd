"""`swquant distill`: from a teacher to a student with fewer layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swquant.cli.options import OUTPUT, takes
from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    OverwriteOption,
    TextOption,
    TrustOption,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.distill.options import DistillOptions

if TYPE_CHECKING:
    from swquant.distill.plan import DistillPlan

__all__ = ["distill"]


@takes(DistillOptions)
def distill(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="A Hugging Face folder, a .gguf file, a hub id or a mixture that `moe` made.",
            show_default=False,
        ),
    ],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    text: TextOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    *,
    options: DistillOptions,
) -> None:
    """Make a student of TEACHER with fewer layers, an ordinary model, and teach it."""
    from swquant.derive import distill as make_student
    from swquant.terminal.distill import plan_record, show_distilled, show_plan

    def show(plan: DistillPlan) -> None:
        if dry_run and as_json:
            print_json(plan_record(plan))
        elif dry_run:
            show_plan(out, plan)

    result = make_student(
        teacher,
        out_folder,
        options,
        text=None if text is None else (text.name, text_of(text)),
        on_plan=show,
        dry_run=dry_run,
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    if result is None:
        return
    if as_json:
        print_json({"path": str(result.path), **result.record})
    else:
        show_distilled(out, result)
