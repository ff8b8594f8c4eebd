"""Options that are declared once: a field of an options class holds its default, its help, its choices and its group.

The command line builds its parameters from the fields (`cli.shared`), the options class checks values against the same
choices, the manifest records the values. To add an option, add a field.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

__all__ = ["described", "flag", "option_help"]


def described(default: Any, text: str) -> Any:
    """A field of an options class: its default, and the text that `--help` and the documents show."""
    return field(default=default, metadata={"help": text})


def option_help(name: str, of: type) -> str:
    """The text of one option, for `--help`."""
    return next(str(item.metadata["help"]) for item in fields(of) if item.name == name)


def flag(name: str) -> str:
    """A field's name as it is typed: `bits_budget` -> `--bits-budget`."""
    return "--" + name.replace("_", "-")
