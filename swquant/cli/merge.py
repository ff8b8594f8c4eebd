"""`swquant merge`: what was trained over a checkpoint becomes part of its codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swquant.cli.options import BASIC, OUTPUT, takes
from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    OverwriteOption,
    TrustOption,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.merge.options import MergeOptions

__all__ = ["merge"]


TunedArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder made by `swquant tune`.", show_default=False)
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINAL",
        help="Where CHECKPOINT holds patches alone, their model; OUT is then a whole one.",
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
EvalOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Measure on this text: without the patches, with them, merged.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINAL",
        help="With --eval-text, what to compare with; CHECKPOINT by default.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@takes(MergeOptions)
def merge(
    checkpoint: TunedArgument,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    base: BaseOption = None,
    eval_text: EvalOption = None,
    against: AgainstOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    options: MergeOptions,
) -> None:
    """Bake the blocks of CHECKPOINT into its codes, for loaders that know no sidecar; says what that costs."""
    from swquant.derive import merge as merge_model
    from swquant.terminal.merge import show_merged

    result = merge_model(
        checkpoint,
        out_folder,
        options,
        eval_text=None if eval_text is None else text_of(eval_text),
        against=against,
        base=base,
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    if as_json:
        print_json({"path": str(result.path), "evaluation": result.evaluation, "manifest": result.manifest})
    else:
        show_merged(out, result)
