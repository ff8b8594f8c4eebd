"""`swquant study`: the paper's experiments on the user's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swquant.cli.options import BASIC, takes
from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    TrustOption,
    make_progress,
    out,
    print_json,
    text_of,
)
from swquant.study.options import StudyOptions
from swquant.terminal.text import marked_sentence, sentence

__all__ = ["study"]


@takes(StudyOptions)
def study(
    model: ModelArgument,
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="FILE",
            help="The text to measure on, a UTF-8 file.",
            show_default=False,
            rich_help_panel=BASIC,
        ),
    ],
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the report goes; <name>-study by default.",
            show_default=False,
            rich_help_panel=BASIC,
        ),
    ] = None,
    as_json: JsonOption = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    *,
    options: StudyOptions,
) -> None:
    """Repeat the super weight paper's experiments on MODEL and write a report."""
    from swquant.api import study as study_model

    result = study_model(
        model,
        text_of(text),
        out_folder,
        options,
        text_name=text.name,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    if as_json:
        print_json({"path": str(result.path), **result.record})
        return
    for section in result.sections:
        out.print(f"[bold]{marked_sentence(section.title)}[/]")
        out.print(sentence(section.finding), markup=False)
    out.print(f"\nReport: {marked_sentence(str(result.path / 'report.html'))}", soft_wrap=True)
