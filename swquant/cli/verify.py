"""`swquant verify`: is every byte as it was written?"""

from __future__ import annotations

import typer

from swquant.cli.shared import CheckpointArgument, JsonOption, err, out, print_json
from swquant.terminal.text import marked_sentence

__all__ = ["verify"]


def verify(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """Read every byte of a compressed checkpoint again and compare it with the manifest."""
    from swquant.api import inspect as read_manifest
    from swquant.api import verify as find_problems
    from swquant.units import human_bytes

    problems = find_problems(checkpoint)
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    elif not problems:
        files = read_manifest(checkpoint)["files"]
        size = human_bytes(sum(record["bytes"] for record in files.values()))
        out.print(
            f"{marked_sentence(str(checkpoint))}: {len(files)} files, {size}, every byte as written", soft_wrap=True
        )
    for problem in problems if not as_json else ():
        err.print(f"[bold red]damaged:[/] {marked_sentence(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
