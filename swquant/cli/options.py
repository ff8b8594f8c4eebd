"""The fields of an options class as the parameters of a command.

    @takes(CompressOptions, FORMATS.values())
    def compress(model: ModelArgument, *, options: CompressOptions, given: Mapping[str, Any]) -> None:

typer sees MODEL, `--bits`, `--block`, …; the command gets the finished object as `options` and, as `given`, what was
typed of the options that only one format has. The groups of the fields are the panels of `--help`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from swquant.declared import GROUPS, flag
from swquant.export.formats import Format, option_names

__all__ = ["BASIC", "OTHER", "OUTPUT", "Grouped", "takes"]

Command = Callable[..., None]

BASIC, *_BETWEEN, OUTPUT, OTHER = (group.capitalize() for group in GROUPS)


class Grouped(TyperCommand):
    """A command whose `--help` stands in the last panel."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option as ever, in that panel."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OTHER
        return option

    def get_params(self, ctx: Any) -> Any:
        """Those as ever, and no type of a value beside a flag, which takes none."""
        parameters = super().get_params(ctx)
        for item in parameters:
            if getattr(item, "is_flag", False):
                item.metavar = ""
        return parameters


def takes(kind: type[Any] | None, formats: Collection[Format] = ()) -> Callable[[Command], Command]:
    """Give a command parameters for the fields of an options class, if any, and of the formats."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**typed: Any) -> None:
            made: dict[str, Any] = {}
            if kind is not None:
                made["options"] = kind(**{item.name: _value(item, typed.pop(item.name)) for item in fields(kind)})
            if formats:
                given = {name: typed.pop(name) for name in option_names(formats, kind)}
                made["given"] = {name: value for name, value in given.items() if value is not None}
            command(**typed, **made)

        signature = _signature(command, kind, formats)
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {name: item.annotation for name, item in signature.parameters.items()}
        return run

    return decorate


def _signature(command: Command, kind: type[Any] | None, formats: Collection[Format]) -> inspect.Signature:
    """The command's own parameters and those of the fields, panel by panel."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [item.replace(kind=item.KEYWORD_ONLY) for item in own if item.name not in ("options", "given")]
    parameters += _parameters(kind) if kind is not None else ()
    panels = [None, BASIC, *_BETWEEN, OUTPUT]  # arguments are in none
    for row in formats:
        if row.options is not None:
            panels.append(panel := f"With --format {row.name}")
            names = option_names([row], kind)
            parameters += [item for item in _parameters(row.options, panel) if item.name in names]
    panels.append(OTHER)
    return inspect.Signature(
        sorted(parameters, key=lambda item: panels.index(item.annotation.__metadata__[0].rich_help_panel))
    )


def _parameters(kind: type[Any], panel: str | None = None) -> Iterator[inspect.Parameter]:
    """One for every field, in the panel of its group. panel: of all of them, which then are None unless typed."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint, default = hints[item.name], item.default
        shown: bool | str = default is not None
        if isinstance(default, tuple):
            hint, default, shown = list[str] | None, None, False
        elif panel is not None:
            hint, default, shown = hint | None, None, str(default) if shown else False
        described, off = item.metadata, item.metadata["off"]
        option = typer.Option(
            f"{flag(item.name)}/{flag(off)}" if off else flag(item.name),
            help=described["help"],
            metavar=described["metavar"],
            show_default=shown,
            rich_help_panel=panel or described["group"].capitalize(),
        )
        annotation = Annotated[hint, option]  # type: ignore[valid-type]
        yield inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(item: Field[Any], typed: Any) -> Any:
    """What was typed, as the field has it."""
    return tuple(typed or ()) if isinstance(item.default, tuple) else typed
