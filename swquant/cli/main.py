"""The commands of `swquant`, and how they end.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 something the user can mend (one message),
2 wrong usage, 130 interrupted. Heavy imports happen inside the commands, so help is instant. Of several processes that
train together (torchrun) one is heard.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from exporters.errors import SwquantError
from swquant.cli.adapt import adapt
from swquant.cli.compress import compress
from swquant.cli.detect import detect
from swquant.cli.distill import distill
from swquant.cli.doctor import doctor
from swquant.cli.evaluate import evaluate
from swquant.cli.export import export
from swquant.cli.generate import generate
from swquant.cli.inspect import inspect
from swquant.cli.merge import merge
from swquant.cli.moe import moe
from swquant.cli.options import Grouped
from swquant.cli.push import push
from swquant.cli.shared import err, out
from swquant.cli.study import study
from swquant.cli.together import Voice, started_together, voice
from swquant.cli.tune import tune
from swquant.cli.verify import verify
from swquant.terminal.text import marked_sentence

__all__ = ["app", "main"]

_TRAINING = ("tune", "adapt", "distill", "moe")  # what several processes can do together
app = typer.Typer(
    name="swquant",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Compress large language models without calibration data: super weights are found with one prompt and kept.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    detect,
    compress,
    export,
    inspect,
    verify,
    evaluate,
    generate,
    tune,
    merge,
    adapt,
    distill,
    moe,
    study,
    push,
    doctor,
):
    app.command(name="eval" if _command is evaluate else _command.__name__, cls=Grouped)(_command)


def _version(value: bool) -> None:
    if value:
        from swquant.version import __version__

        out.print(f"swquant {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in _TRAINING and started_together():
        raise SwquantError(
            f"swquant {context.invoked_subcommand} is done by one process; start it without torchrun or accelerate launch "
            f"({', '.join(_TRAINING)} train in several)"
        )


def main(words: Sequence[str] | None = None) -> None:
    """Entry point, of the words that the process was started with by default: turns what users can mend into one line
    on stderr. Typer turns Ctrl-C into exit code 130, and a reader gone (`swquant inspect … | head`) into 1."""
    ours = Voice()
    code: object = 0
    try:
        ours = voice()
    except SwquantError as error:
        _fail(str(error), error, ours)
    try:
        _run(words, ours)
    except SystemExit as end:
        code = end.code
        raise
    finally:
        ours.end(code)


def _run(words: Sequence[str] | None, ours: Voice) -> None:
    # Modules and models are a million objects that stay; as often as Python does it, walking over them takes a tenth.
    gc.set_threshold(50_000, 20, 50)
    try:
        with ours.muted():
            app(words, prog_name="swquant")
    except SwquantError as error:
        _fail(str(error), error, ours)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), error, ours)
    except (MemoryError, RuntimeError) as error:
        if not _is_no_memory(error):
            raise
        _fail(
            "not enough memory; close other programs, add --low-memory where there is one, or use a larger machine",
            error,
            ours,
        )
    except SystemExit as end:
        if end.code == 130 and ours.speaks(interrupted=True):
            kept = _notes(end) or "nothing half-written was left behind"
            with suppress(OSError):  # after SIGHUP there is no terminal any more
                err.print(f"interrupted; {marked_sentence(kept)}", soft_wrap=True)
        raise


def _is_no_memory(error: Exception) -> bool:
    """torch says so in words: its allocators raise RuntimeError."""
    words = ("can't allocate memory", "cannot allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _notes(error: BaseException) -> str:
    """What the pipelines added to an error, or to the one that it comes from: what is not lost."""
    cause: BaseException | None = error
    while cause is not None:
        if notes := getattr(cause, "__notes__", ()):
            return "; ".join(notes)
        cause = cause.__cause__ or cause.__context__
    return ""


def _fail(message: str, error: BaseException, ours: Voice) -> None:
    if ours.speaks():
        kept = _notes(error)
        err.print(f"[bold red]error:[/] {marked_sentence(f'{message}; {kept}' if kept else message)}", soft_wrap=True)
    sys.exit(1)
