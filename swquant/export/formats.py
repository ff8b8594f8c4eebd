"""What `compress` can write: one row per format, which the commands and the Python interface ask.

A new format is a new row: its options class (what only it has), what must be installed, what of a plan it cannot
express, and how it is written. What is heavy is imported inside the row's functions, since `swquant --help` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from exporters.errors import SwquantError
from swquant.declared import flag
from swquant.export.onnx.options import ExportOptions
from swquant.progress import Progress

if TYPE_CHECKING:
    from swquant.compress.options import CompressOptions
    from swquant.compress.pipeline import Compressed
    from swquant.compress.writing import Prepared
    from swquant.export.onnx.pipeline import Exported

__all__ = ["FORMATS", "Format", "Planned", "format_named", "option_names"]


class Carrying(TypedDict):
    """How a plan is carried out, see `Planned.run`."""

    overwrite: bool
    fresh: bool
    progress: Progress


@dataclass(frozen=True)
class Format:
    """What can be written. text: what it is, for `--help`. suffix: what the default name of OUT ends in.

    offsets: the kind that it holds best, see `CompressOptions.suiting`; holds: all kinds that it can hold. options: the
    class of those that only this format has. require: raises SwquantError where something that it needs is
    not installed. check_plan: raises SwquantError for a plan that it cannot express with these options of it, before
    hours are spent on it. run: carries out a plan; OUT appears whole or not at all.
    """

    name: str
    text: str
    suffix: str
    offsets: str
    holds: tuple[str, ...]
    options: type[Any] | None
    require: Callable[[], None]
    check_plan: Callable[[Prepared, Any], None]
    run: Callable[[Planned, Carrying], Compressed | Exported]

    def suited(self, options: CompressOptions) -> CompressOptions:
        """The options with the offsets that it holds best, unless they were chosen. Raises SwquantError for a kind that
        it cannot hold."""
        suited = options.suiting(self.offsets)
        if suited.offset_kind not in self.holds:
            raise SwquantError(
                f"--offsets {suited.offset_kind}: format {self.name} holds {' or '.join(self.holds)}; use one of these"
            )
        return suited

    def chosen(self, given: Mapping[str, Any], *, int8: bool) -> Any:
        """Its options from those that were given for any format, None where it has none. int8: whether activations are
        rounded. Raises SwquantError for one of another format."""
        own = option_names([self])
        if foreign := next((name for name in given if name not in own), None):
            owner = next(row.name for row in FORMATS.values() if foreign in option_names([row]))
            raise SwquantError(f"{flag(foreign)} is an option of the export; add --format {owner}")
        return self.options(**given).resolved(int8) if self.options is not None else None


@dataclass(frozen=True)
class Planned:
    """What `compress` is about to write: the plan, where to, in which format, and the options that only this format
    has. left: a sentence on what another run left of OUT, "" where there is nothing."""

    prepared: Prepared
    out: Path
    format: Format
    export: Any
    left: str = ""

    def run(self, *, overwrite: bool, fresh: bool = False, progress: Progress) -> Compressed | Exported:
        """Carry it out. overwrite: OUT may be replaced. fresh: what an interrupted run left is not taken up."""
        return self.format.run(self, {"overwrite": overwrite, "fresh": fresh, "progress": progress})


def option_names(formats: Iterable[Format] | None = None) -> tuple[str, ...]:
    """The options that only these formats have; of all by default."""
    kinds = [row.options for row in (FORMATS.values() if formats is None else formats) if row.options is not None]
    return tuple(dict.fromkeys(item.name for kind in kinds for item in fields(kind)))


def format_named(name: str) -> Format:
    """The row of what a user typed. Raises SwquantError for a name that is none."""
    if name not in FORMATS:
        raise SwquantError(f"format {name!r} is not one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def _nothing(*_: object) -> None:
    """Nothing to require, nothing that cannot be expressed."""


def _write_checkpoint(planned: Planned, how: Carrying) -> Compressed:
    from swquant.compress.pipeline import write

    return write(planned.prepared, planned.out, **how)


def _require_onnx() -> None:
    from swquant.models.runtime import require_exporter

    require_exporter()


def _check_for_onnx(prepared: Prepared, options: ExportOptions) -> None:
    from swquant.export.onnx.pipeline import check_plan

    check_plan(prepared, options)


def _write_onnx(planned: Planned, how: Carrying) -> Exported:
    from swquant.export.onnx.pipeline import write_exported

    return write_exported(planned.prepared, planned.out, planned.export, **how)


_ROWS = (
    Format(
        name="checkpoint",
        text="for transformers and vLLM",
        suffix="",
        offsets="none",
        holds=("none", "float"),
        options=None,
        require=_nothing,
        check_plan=_nothing,
        run=_write_checkpoint,
    ),
    Format(
        name="onnx",
        text="a folder for ONNX Runtime, see export",
        suffix="-onnx",
        offsets="byte",
        holds=("none", "float", "byte"),
        options=ExportOptions,
        require=_require_onnx,
        check_plan=_check_for_onnx,
        run=_write_onnx,
    ),
)
FORMATS = {row.name: row for row in _ROWS}
