"""`swquant generate`: what a model says."""

from __future__ import annotations

from typing import Annotated

import typer

from swquant.cli.shared import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    RestoreOption,
    TrustOption,
    make_progress,
    print_json,
)
from swquant.terminal.text import written

__all__ = ["generate"]


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.", show_default=False)],
    tokens: Annotated[int, typer.Option(metavar="N", help="At most so many new tokens.")] = 40,
    restore: RestoreOption = True,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt, always with the likeliest token."""
    from swquant.api import generate as continue_prompt

    text = continue_prompt(
        model,
        prompt,
        tokens=tokens,
        restore=restore,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=make_progress(as_json),
    )
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        typer.echo(written(text))
