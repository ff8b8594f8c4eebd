"""`swquant distill`: from a teacher to a student with fewer layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swquant.cli.options import BASIC, takes
from swquant.cli.shared import JsonOption, TrustOption, make_progress, out, print_json, text_of
from swquant.distill.options import DistillOptions

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
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="The text to learn on, a UTF-8 file; what the teacher writes by default.",
            show_default=False,
            rich_help_panel=BASIC,
        ),
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
    *,
    options: DistillOptions,
) -> None:
    """Make a student of TEACHER with fewer layers, an ordinary model, and teach it."""
    from swquant.derive import distill as make_student
    from swquant.terminal.distill import show_distilled

    result = make_student(
        teacher,
        out_folder,
        options,
        text=None if text is None else (text.name, text_of(text)),
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    if as_json:
        print_json({"path": str(result.path), **result.record})
    else:
        show_distilled(out, result)
