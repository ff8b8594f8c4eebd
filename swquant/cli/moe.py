"""`swquant moe`: from a dense model to a pyramid-residual mixture of experts."""

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
from swquant.moe.options import MoeOptions

if TYPE_CHECKING:
    from swquant.moe.plan import MoePlan

__all__ = ["moe"]


@takes(MoeOptions)
def moe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face folder, a .gguf file or a hub id (OWNER/NAME).", show_default=False
        ),
    ],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    text: TextOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be made; write nothing.", rich_help_panel=OUTPUT),
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    *,
    options: MoeOptions,
) -> None:
    """Turn MLPs of MODEL into mixtures of experts; OUT computes what MODEL computes until it is trained."""
    from swquant.derive import moe as make_mixture
    from swquant.terminal.moe import mixed_record, plan_record, show_mixed, show_plan

    def show(plan: MoePlan) -> None:
        if not as_json:
            show_plan(out, plan)
        elif dry_run:
            print_json(plan_record(plan))

    result = make_mixture(
        model,
        out_folder,
        options,
        text=None if text is None else (text.name, text_of(text)),
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        on_plan=show,
        dry_run=dry_run,
        progress=make_progress(as_json),
    )
    if result is None:
        return
    if as_json:
        print_json(mixed_record(result))
    else:
        show_mixed(out, result)
