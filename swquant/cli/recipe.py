"""`--recipe FILE` and `--like OUT`: options from a file, or those that a checkpoint was made with.

    bits: 4                  # a YAML file with the names that are typed, hyphens or underscores
    block: 64
    bits-for: [down_proj=6]
    format: gguf

What they say takes the place of the defaults, so whatever is typed beside them wins, and every value is checked as if
it had been typed. Both are read before all other options. A recipe wins over `--like`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from exporters.errors import SwquantError
from exporters.text import shown
from swquant.cli.options import BASIC

__all__ = ["LikeOption", "RecipeOption"]

_LARGEST = 1 << 20  # bytes of a recipe
_NOT_IN_A_RECIPE = ("recipe", "like", "help")


def _recipe(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        taken = _taken(context, str(path), _read(path))
        context.default_map = {**(context.default_map or {}), **taken}
    return path


def _like(context: typer.Context, folder: Path | None) -> Path | None:
    if folder is not None:
        from swquant.api import inspect
        from swquant.checkpoints.manifest import made_with

        if (made := made_with(inspect(folder))) is None:
            raise SwquantError(f"--like {folder}: holds patches alone, which compress did not make; give a checkpoint")
        given = {name: value for name, value in made.items() if value is not None}
        context.default_map = {**_taken(context, str(folder), given), **(context.default_map or {})}
    return folder


RecipeOption = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Options from a YAML file, with the names that are typed; what is typed wins.",
        callback=_recipe,
        is_eager=True,
        show_default=False,
        rich_help_panel=BASIC,
    ),
]
LikeOption = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="OUT",
        help="Options that this checkpoint was made with.",
        callback=_like,
        is_eager=True,
        show_default=False,
        rich_help_panel=BASIC,
    ),
]


def _read(path: Path) -> Mapping[str, Any]:
    """What a YAML file says. Raises SwquantError unless that is a mapping whose keys are text, each there once."""
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise SwquantError(f"{path}: larger than 1 MB, which is no recipe")
        node = yaml.compose(data.decode("utf-8-sig"), yaml.SafeLoader)
        found = yaml.safe_load(data)
    except OSError as error:
        raise SwquantError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SwquantError(f"{path}: not YAML ({' '.join(str(error).split())}); write one option a line") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SwquantError(f"{path}: not a recipe; write one option a line, as in bits: 4")
    if len(node.value) > len(found):
        raise SwquantError(f"{path}: an option is there twice; give each once")
    return found


def _taken(context: typer.Context, source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter -> value, as typing it would give it. source: for messages. Raises SwquantError for a name that the
    command does not have, and for a value that nobody can type."""
    known: dict[str, tuple[Any, bool]] = {}
    for item in context.command.params:
        if item.name not in _NOT_IN_A_RECIPE and item.param_type_name == "option":
            known |= {name.lstrip("-"): (item, True) for name in item.opts}
            known |= {name.lstrip("-"): (item, False) for name in item.secondary_opts}
    taken: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("_", "-")
        if name not in known:
            raise SwquantError(
                f"{source}: {shown(key, 60)!r} is no option of {context.info_name}; it has {', '.join(sorted(known))}"
            )
        item, means = known[name]
        taken[item.name] = _value(source, item, value, means)
    return taken


def _value(source: str, item: Any, value: Any, means: bool) -> Any:
    """One value, in the form that is typed. means: what a flag of this name stands for, False for `no-restore`."""
    said = f"{source}: {item.opts[0].lstrip('-')}: {shown(value, 60)}"
    if isinstance(value, bool) != item.is_flag:
        raise SwquantError(f"{said} is not {'true or false' if item.is_flag else 'a value that it takes'}")
    if item.is_flag:
        return value == means
    values = value if isinstance(value, list) and item.multiple else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise SwquantError(f"{said} is not {'a list of' if item.multiple else 'one'} text or number")
    texts = [str(one) for one in values]
    return texts if item.multiple else texts[0]
