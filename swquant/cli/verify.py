"""`swquant verify`: is every byte as it was written, and does a stock loader take it?"""

from __future__ import annotations

from typing import Annotated

import typer

from swquant.cli.shared import CheckpointArgument, JsonOption, TrustOption, err, out, print_json
from swquant.terminal.text import marked_sentence

__all__ = ["verify"]

LoadsOption = Annotated[
    bool,
    typer.Option("--loads", help="Also let stock transformers look at it (ONNX Runtime, where OUT is an export)."),
]


def verify(
    checkpoint: CheckpointArgument,
    loads: LoadsOption = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a compressed checkpoint again and compare it with the manifest."""
    from swquant.api import verify as find_problems
    from swquant.checkpoints.manifest import MANIFEST
    from swquant.output.contents import FILES, contents
    from swquant.units import human_bytes

    problems, loaded, word = find_problems(checkpoint), "", "damaged"
    if loads and not problems:
        from swquant.models.loads import loading_of

        loading = loading_of(checkpoint, trust_remote_code=trust_remote_code)
        problems, loaded, word = [loading.problem] if loading.problem else [], loading.text, "refused"
    if as_json:
        print_json({"ok": not problems, "problems": problems} | ({"loads": loaded or None} if loads else {}))
    elif not problems:
        files = contents(checkpoint) - {MANIFEST, FILES}
        size = human_bytes(sum((checkpoint / name).stat().st_size for name in files))
        out.print(
            f"{marked_sentence(str(checkpoint))}: {len(files)} files, {size}, every byte as written", soft_wrap=True
        )
        if loaded:
            out.print(marked_sentence(loaded), soft_wrap=True)
    for problem in problems if not as_json else ():
        err.print(f"[bold red]{word}:[/] {marked_sentence(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(1)
