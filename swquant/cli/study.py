"""`swquant study`: the paper's experiments on the user's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from swquant.cli.shared import (
    JsonOption,
    ModelArgument,
    PromptOption,
    TrustOption,
    err,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.declared import option_help
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.study.options import StudyOptions

__all__ = ["study"]


def study(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help="The text to measure on, a UTF-8 file.", show_default=False)],
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the report goes; <name>-study by default.", show_default=False
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help=option_help("only", StudyOptions), show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=option_help("quick", StudyOptions))] = StudyOptions.quick,
    window: Annotated[int, typer.Option(help=option_help("window", StudyOptions))] = StudyOptions.window,
    limit: Annotated[
        int | None, typer.Option(help=option_help("limit", StudyOptions), show_default=False)
    ] = StudyOptions.limit,
    bits: Annotated[int, typer.Option(help=option_help("bits", StudyOptions))] = StudyOptions.bits,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help=option_help("tasks", StudyOptions), show_default=False)
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(metavar="N", help=option_help("task_limit", StudyOptions), show_default=False)
    ] = StudyOptions.task_limit,
    download: Annotated[
        bool, typer.Option("--download", help=option_help("download", StudyOptions))
    ] = StudyOptions.download,
    prompt: PromptOption = DEFAULT_PROMPT,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Repeat the super weight paper's experiments on MODEL and write a report."""
    options = StudyOptions(
        only=tuple(only or ()), quick=quick, window=window, limit=limit, bits=bits, tasks=tuple(tasks or ()),
        task_limit=task_limit, download=download, prompt=prompt,
    )  # fmt: skip
    from swquant.checkpoints.open import open_checkpoint
    from swquant.study.pipeline import study_checkpoint

    content = text_of(text)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        target = out_folder if out_folder is not None else Path(f"{checkpoint.name}-study")
        try:
            result = study_checkpoint(
                checkpoint, content, target, options, text_name=text.name, progress=make_progress(as_json)
            )
        except KeyboardInterrupt:
            if (target / "cache").is_dir():
                err.print(
                    f"What was measured stays in {escape(str(target))} and is used by the next run", soft_wrap=True
                )
            raise
    if as_json:
        print_json({"path": str(result.path), **result.record})
        return
    for section in result.sections:
        out.print(f"[bold]{escape(section.title)}[/]")
        out.print(section.finding, markup=False)
    out.print(f"\nReport: {escape(str(result.path / 'report.html'))}", soft_wrap=True)
