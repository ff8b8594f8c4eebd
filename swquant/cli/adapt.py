"""`swquant adapt`: learn task after task over a compressed checkpoint, in sets that are reused or grown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporters.errors import SwquantError
from swquant.adapt.options import AdaptOptions
from swquant.cli.options import BASIC, OUTPUT, takes
from swquant.cli.shared import DeviceOption, JsonOption, TrustOption, make_progress, out, print_json

if TYPE_CHECKING:
    from swquant.adapt.plan import AdaptPlan

__all__ = ["adapt"]

TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME=FILE",
        help="A task: a text, or a .jsonl file of prompts and responses. Repeatable, in their order.",
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(
        "--drop-set", metavar="SET", help="Take a set out of the pool.", show_default=False, rich_help_panel=OUTPUT
    ),
]
ImportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--import-set",
        metavar="FILE",
        help="Put a set into the pool that --export-set wrote.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
ExportOption = Annotated[
    str | None,
    typer.Option(
        "--export-set",
        metavar="SET",
        help="Write a set into the file OUT, and do nothing else.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


@takes(AdaptOptions)
def adapt(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A folder made by `swquant compress`.", show_default=False)
    ],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    task: TaskOption = None,
    drop_set: DropOption = None,
    import_set: ImportOption = None,
    export_set: ExportOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Decide, and train and write nothing.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint already.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    options: AdaptOptions,
) -> None:
    """Learn tasks one after the other over CHECKPOINT: each in a set that it does not hurt, or in a new one."""
    from swquant.derive import adapt as adapt_model
    from swquant.terminal.adapt import show_adapt_plan, show_adapted, show_decisions

    tasks = _named(task or ())
    if export_set is not None:
        if task or drop_set or import_set:
            raise SwquantError("--export-set does nothing else; leave out --task, --drop-set and --import-set")
        _copied(checkpoint, export_set, out_folder, overwrite, as_json)
        return

    def show(plan: AdaptPlan) -> None:
        if not as_json:
            show_adapt_plan(out, plan)

    result = adapt_model(
        checkpoint, out_folder, tasks, options, drop=drop_set or (), imports=import_set or (), overwrite=overwrite,
        device=device, dry_run=dry_run, on_plan=show, trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )  # fmt: skip
    if isinstance(result, dict):
        if as_json:
            print_json(result)
        else:
            show_decisions(out, result)
    elif as_json:
        print_json({"path": str(result.path), "sets": result.sets, "manifest": result.manifest})
    else:
        show_adapted(out, result)


def _copied(checkpoint: Path, of_set: str, file: Path, overwrite: bool, as_json: bool) -> None:
    from swquant.derive import export_set
    from swquant.terminal.text import marked_sentence

    export_set(checkpoint, of_set, file, overwrite=overwrite)
    if as_json:
        print_json({"path": str(file), "set": of_set})
    else:
        out.print(f"Written to [bold]{marked_sentence(str(file))}[/]", soft_wrap=True)


def _named(typed: Sequence[str]) -> dict[str, str]:
    """Name -> file, of every NAME=FILE."""
    tasks: dict[str, str] = {}
    for text in typed:
        name, equals, file = text.partition("=")
        if not (name and equals and file):
            raise SwquantError(f"--task {text}: not NAME=FILE; write --task law=law.txt")
        if name in tasks:
            raise SwquantError(f"--task names two tasks alike ({name}); give each a name of its own")
        tasks[name] = file
    return tasks
