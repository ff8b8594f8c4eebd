"""What all commands share: the consoles, the parameters that several of them take, and JSON output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from exporters.errors import SwquantError
from exporters.text import harmless_json
from swquant.cli.options import BASIC, OTHER, OUTPUT

if TYPE_CHECKING:
    from swquant.compress.pipeline import Compressed
    from swquant.export.gguf.pipeline import Written
    from swquant.export.mlx.pipeline import MlxFolder
    from swquant.export.onnx.pipeline import Exported
    from swquant.progress import Progress

__all__ = [
    "BaseOption",
    "CheckpointArgument",
    "DeviceOption",
    "JsonOption",
    "LowMemoryOption",
    "MemoryOption",
    "ModelArgument",
    "OverwriteOption",
    "RestoreOption",
    "TaskOption",
    "TextOption",
    "TrustOption",
    "err",
    "make_progress",
    "out",
    "print_json",
    "show_written",
    "text_of",
]

# No emoji: in a name, `:fire:` is text.
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a .gguf file, a hub id (OWNER/NAME) or a compressed checkpoint.",
        show_default=False,
    ),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="A folder made by swquant.", show_default=False)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.", rich_help_panel=OTHER)
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=OTHER),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Learn from this text, a UTF-8 file.",
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
LowMemoryOption = Annotated[
    bool,
    typer.Option("--low-memory", help="Probe with one layer's weights in memory at a time.", rich_help_panel=OTHER),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Stay under SIZE of memory (12GB): weights are left in their files where they must be.",
        show_default=False,
        rich_help_panel=OTHER,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:1; auto takes a GPU where there is one.",
        rich_help_panel=OTHER,
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace OUT if swquant made it and nothing else is in it.", rich_help_panel=OUTPUT
    ),
]
RestoreOption = Annotated[
    bool,
    typer.Option("--restore/--no-restore", help="Lay the sidecar's outliers back, or see what a stock loader sees."),
]

TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="Answer with the set of the pool that serves this task; auto: the input chooses.",
        show_default=False,
    ),
]


BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="ORIGINAL",
        help="Where MODEL holds patches alone (tune): what they lie over.",
        show_default=False,
    ),
]


def make_progress(as_json: bool) -> Progress:
    """What reports progress on stderr; with --json nothing does."""
    from swquant.progress import Progress
    from swquant.terminal.console import Terminal

    return Progress() if as_json else Terminal(err)


def text_of(path: Path) -> str:
    """The text of a file given by the user."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except OSError as error:
        raise SwquantError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise SwquantError(f"{path}: not UTF-8 text; give a plain text file") from None


def print_json(content: Any) -> None:
    """One document on stdout, for machines: whatever the width of the terminal, nothing wraps it."""
    sys.stdout.write(harmless_json(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)) + "\n")
    sys.stdout.flush()  # a reader that went away is noticed here, not when Python ends


def show_written(result: Compressed | Exported | MlxFolder | Written, as_json: bool) -> None:
    """Print what was written."""
    from swquant.terminal.formats import view_of

    if as_json:
        print_json({"path": str(result.path), "manifest": result.manifest})
    else:
        view_of(result.manifest).written(out, result)
