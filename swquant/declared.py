"""Options that are declared once: a field of an options class holds its default, its help, its choices and its group.

The command line makes its parameters of the fields (`cli.options`), the options class checks values against the same
choices, the manifest records the values. To add an option, add a field, and its type to the keywords beside the class,
which are what editors complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields, replace
from typing import Any, TypeVar

from exporters.errors import SwquantError

__all__ = ["GROUPS", "check_choices", "described", "flag", "made_of", "parse_rate"]

# The panels of `--help`, from the top; a panel of options that go with one value of another comes before the last.
GROUPS = ("basic", "tensors", "rounding", "activations", "training", "output", "other")

Options = TypeVar("Options")


def described(
    default: Any,
    text: str,
    *,
    group: str = "other",
    choices: tuple[Any, ...] = (),
    metavar: str | None = None,
    off: str | None = None,
    called: str | None = None,
) -> Any:
    """A field of an options class: its default, and the text that `--help` and the documents show.

    group: one of GROUPS. choices: all that it can be, beside a default of None. metavar: what stands for a value in
    `--help`, the choices by themselves. off: the name of the flag that says no. called: what an error calls it, its
    flag by itself.
    """
    assert group in GROUPS
    return field(
        default=default,
        metadata={
            "help": text,
            "group": group,
            "choices": choices,
            "metavar": metavar or "|".join(map(str, choices)) or None,
            "off": off,
            "called": called,
        },
    )


def check_choices(options: Any, show: Callable[[Any], str] = repr) -> None:
    """Raise SwquantError for a value, or a part of a repeatable one, that is not among its field's choices."""
    for item in fields(options):
        value = getattr(options, item.name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if not _possible(item, one):
                known = ", ".join(map(str, item.metadata["choices"]))
                raise SwquantError(f"{item.metadata['called'] or flag(item.name)} {show(one)} is not one of: {known}")


def _possible(item: Field[Any], value: Any) -> bool:
    choices = item.metadata["choices"]
    return not choices or value in choices or (value is None and item.default is None)


def made_of(kind: type[Options], ready: Options | None, changes: Mapping[str, Any]) -> Options:
    """The options that a caller gave: as an object, as keywords, or as an object and keywords that change it."""
    return kind(**changes) if ready is None else replace(ready, **changes)  # type: ignore[type-var]


def parse_rate(text: str) -> float | None:
    """The value of `--lr`: a learning rate, None for `auto`, which is found out. Raises SwquantError for neither."""
    if text == "auto":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < 1:
        raise SwquantError(f"--lr {text!r} is no rate between 0 and 1; auto finds one")
    return rate


def flag(name: str) -> str:
    """A field's name as it is typed: `bits_budget` -> `--bits-budget`, `from_` (a word of Python's) -> `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")
