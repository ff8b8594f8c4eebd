"""`swquant generate`: what a model says."""

from __future__ import annotations

from typing import Annotated

import typer

from swquant.cli.shared import (
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    RestoreOption,
    TaskOption,
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
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a user's: put it into the model's chat template.")
    ] = False,
    restore: RestoreOption = True,
    task: TaskOption = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt, always with the likeliest token, as it is written."""
    from swquant.derive import generate as continue_prompt

    text = continue_prompt(
        model,
        prompt,
        tokens=tokens,
        chat=chat,
        restore=restore,
        task=task,
        base=base,
        device=device,
        trust_remote_code=trust_remote_code,
        on_text=None if as_json else _show,
        progress=make_progress(as_json),
    )
    if as_json:
        print_json({"prompt": prompt, "text": text})
    else:
        typer.echo()


def _show(piece: str) -> None:
    typer.echo(written(piece), nl=False)
