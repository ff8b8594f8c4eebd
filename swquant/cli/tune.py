"""`swquant tune`: train a few blocks of weights over a model, or the scales of a compressed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swquant.cli.options import BASIC, OUTPUT, takes
from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    TextOption,
    TrustOption,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.tune.options import TuneOptions

if TYPE_CHECKING:
    from swquant.tune.plan import TunePlan

__all__ = ["tune"]


AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINAL",
        help="Learn its predictions, on text that it writes unless there is another.",
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Learn the responses of prompts or messages, one conversation a line.",
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
EvalOption = Annotated[
    Path | None,
    typer.Option(
        "--eval-text",
        metavar="FILE",
        help="Measure on this text before and after, as swquant eval does.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


ModelOption = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder made by `swquant compress`, or an original.", show_default=False),
]
MergeOption = Annotated[
    bool,
    typer.Option("--merge", help="Of an original: write all of it, not the patches alone.", rich_help_panel=OUTPUT),
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be trained; write nothing.", rich_help_panel=OUTPUT)
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace OUT if it is a checkpoint, or patches alone.", rich_help_panel=OUTPUT),
]


@takes(TuneOptions)
def tune(
    checkpoint: ModelOption,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    against: AgainstOption = None,
    text: TextOption = None,
    data: DataOption = None,
    eval_text: EvalOption = None,
    whole: MergeOption = False,
    dry_run: DryOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    options: TuneOptions,
) -> None:
    """Train a few blocks of weights over MODEL, which stays as it is; of a compressed one, OUT holds both."""
    from swquant.derive import tune as tune_model
    from swquant.terminal.tune import show_tune_plan, show_tuned
    from swquant.tune.records import plan_record

    evaluated = None if eval_text is None else text_of(eval_text)

    def show(plan: TunePlan) -> None:
        if not as_json:
            show_tune_plan(out, plan)
        elif dry_run:
            print_json(plan_record(plan))

    given = None if text is None else text_of(text)
    progress = make_progress(as_json)
    result = tune_model(
        checkpoint, out_folder, options, against=against, text=given, data=data, eval_text=evaluated,
        text_name="text" if text is None else text.name, whole=whole, device=device, overwrite=overwrite, dry_run=dry_run, on_plan=show,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    if result is None:
        return
    if as_json:
        print_json(
            {
                "path": str(result.path),
                "set": result.set,
                "evaluation": result.evaluation,
                "manifest": result.manifest,
                "record": result.record,
            }
        )
    else:
        show_tuned(out, result)
