"""`swquant push`: a compressed checkpoint onto the hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from swquant.cli.shared import CheckpointArgument, JsonOption, make_progress, out, print_json

__all__ = ["push"]


def push(
    checkpoint: CheckpointArgument,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where there is none.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one, where it is made.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, and show what would be sent; send nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a compressed checkpoint on the Hugging Face hub, if every byte of it is as it was written."""
    from swquant.derive import push as push_checkpoint
    from swquant.terminal.push import show_pushed

    pushed = push_checkpoint(checkpoint, repository, private=private, dry_run=dry_run, progress=make_progress(as_json))
    if as_json:
        print_json(asdict(pushed))
    else:
        show_pushed(out, pushed)
