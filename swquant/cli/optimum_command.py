"""`optimum-cli export swquant`: `swquant compress --format onnx` and `swquant export` where users of optimum look.

optimum-cli loads every file in the namespace package optimum.commands.register, whoever installed it, and takes its
REGISTER_COMMANDS. Hence the place of this file, and no `__init__.py` beside it. The options are read from swquant's own
command line, so they are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from swquant.checkpoints.manifest import MANIFEST
from swquant.cli import app, main
from swquant.export.formats import FORMATS, option_names

__all__ = ["REGISTER_COMMANDS", "SwquantExportCommand"]


def _options(command: str) -> Iterator[Any]:
    """The options of a swquant command, as typer knows them."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    others = {"form", *option_names(row for row in FORMATS.values() if row.name != "onnx")}
    return (item for item in parameters if item.param_type_name == "option" and item.name not in others)


class _Words(argparse.Action):
    """Collects options as they were typed, to hand them on."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        typed = [flag] if values == [] else [flag, values]
        namespace.words = [*getattr(namespace, "words", []), *typed]


class SwquantExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The sub-command."""

    COMMAND = CommandInfo(name="swquant", help="Compress a model without calibration data and export it to ONNX.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare what `swquant compress` takes."""
        parser.add_argument(
            "-m",
            "--model",
            required=True,
            help="A Hugging Face folder, a .gguf file, a hub id, or a checkpoint of swquant.",
        )
        parser.add_argument("output", help="The folder to create.")
        for option in _options("compress"):
            for flags in filter(None, (option.opts, option.secondary_opts)):
                count: dict[str, Any] = {"nargs": 0} if option.is_flag else {"metavar": option.metavar}
                text = (option.help or "").replace("%", "%%")
                parser.add_argument(*flags, action=_Words, help=text, default=argparse.SUPPRESS, **count)

    def run(self) -> None:
        """Do it, with swquant's own messages and exit codes."""
        words = getattr(self.args, "words", [])
        if (Path(self.args.model) / MANIFEST).is_file():  # compressed already
            main(["export", self.args.model, self.args.output, *words])
        else:
            main(["compress", self.args.model, self.args.output, "--format", "onnx", *words])


REGISTER_COMMANDS = [(SwquantExportCommand, ExportCommand)]
