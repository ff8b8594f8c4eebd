"""What `compress` can write: one row per format, which the commands and the Python interface ask.

A new format is a new row: its options class (what only it has), what must be installed, what of a plan it cannot
express, and how it is written. What is heavy is imported inside the row's functions, since `swquant --help` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from exporters.errors import SwquantError
from swquant.declared import flag
from swquant.export.gguf.options import GgufOptions
from swquant.export.onnx.options import ExportOptions
from swquant.progress import Progress

if TYPE_CHECKING:
    import torch

    from swquant.checkpoints.base import Checkpoint
    from swquant.checkpoints.compressed import CompressedCheckpoint
    from swquant.compress.options import CompressOptions
    from swquant.compress.pipeline import Compressed
    from swquant.compress.prepared import Prepared
    from swquant.export.gguf.pipeline import Written
    from swquant.export.mlx.pipeline import MlxFolder
    from swquant.export.onnx.pipeline import Exported

__all__ = ["EXPORTS", "FORMATS", "Format", "Planned", "export_format", "format_named", "option_names"]


class Carrying(TypedDict):
    """How a plan is carried out, see `Planned.run`."""

    overwrite: bool
    fresh: bool
    progress: Progress


class Exporting(TypedDict):
    """How a checkpoint is exported, see `export_checkpoint` and `export_gguf`."""

    overwrite: bool
    device: torch.device
    progress: Progress


@dataclass(frozen=True)
class Format:
    """What can be written. text: what it is, for `--help`. suffix: what the default name of OUT ends in.

    options: the class of those that only this format has. suited: the options of `compress` as it holds them best, with
    its own; raises SwquantError for what it cannot hold. require: raises SwquantError where something that it needs is
    not installed. check_out: raises SwquantError for an OUT that cannot be created or replaced. fitted: the plan as it
    is written with these options of it; raises SwquantError for one that it cannot express, before hours are spent on
    it. run: carries out a plan; OUT appears whole or not at all. export: does so with a compressed checkpoint, None
    where it is one. stock: whether stock transformers loads it, or the checkpoint that is written on the way.
    """

    name: str
    text: str
    suffix: str
    options: type[Any] | None
    suited: Callable[[CompressOptions, Any], CompressOptions]
    require: Callable[[], None]
    check_out: Callable[[Path, bool, Checkpoint], None]
    fitted: Callable[[Prepared, Any], Prepared]
    run: Callable[[Planned, Carrying], Compressed | Exported | MlxFolder | Written]
    export: Callable[[CompressedCheckpoint, Path, Any, Exporting], Exported | MlxFolder | Written] | None = None
    stock: bool = True

    def chosen(self, given: Mapping[str, Any], *, int8: bool, resolve: bool = True) -> Any:
        """Its options from those that were given for any format, None where it has none. int8: whether activations are
        rounded; resolve: whether that is known yet. Raises SwquantError for one of another format."""
        own, known = option_names([self]), option_names()
        if foreign := next((name for name in given if name in known and name not in own), None):
            owner = next(row.name for row in FORMATS.values() if foreign in option_names([row]))
            raise SwquantError(f"{flag(foreign)} is an option of the export; add --format {owner}")
        made = self.options(**given) if self.options is not None else None
        return made.resolved(int8) if made is not None and resolve else made

    def shared(self, options: CompressOptions) -> dict[str, Any]:
        """Those of its options that `compress` has under the same name, for all formats, as they were given there."""
        own = fields(self.options) if self.options is not None else ()
        return {item.name: getattr(options, item.name) for item in own if hasattr(options, item.name)}


@dataclass(frozen=True)
class Planned:
    """What `compress` is about to write: the plan, where to, in which format, and the options that only this format
    has. left: a sentence on what another run left of OUT, "" where there is nothing."""

    prepared: Prepared
    out: Path
    format: Format
    export: Any
    left: str = ""

    def run(
        self, *, overwrite: bool, fresh: bool = False, progress: Progress
    ) -> Compressed | Exported | MlxFolder | Written:
        """Carry it out. overwrite: OUT may be replaced. fresh: what an interrupted run left is not taken up."""
        return self.format.run(self, {"overwrite": overwrite, "fresh": fresh, "progress": progress})


def option_names(formats: Iterable[Format] | None = None, beside: type[Any] | None = None) -> tuple[str, ...]:
    """The options that these formats have; of all by default. beside: an options class whose fields are left out."""
    kinds = [row.options for row in (FORMATS.values() if formats is None else formats) if row.options is not None]
    there = {item.name for item in fields(beside)} if beside is not None else set()
    return tuple(dict.fromkeys(item.name for kind in kinds for item in fields(kind) if item.name not in there))


def format_named(name: str) -> Format:
    """The row of what a user typed. Raises SwquantError for a name that is none."""
    if name not in FORMATS:
        raise SwquantError(f"format {name!r} is not one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def export_format(out: Path, name: str | None) -> Format:
    """The row of an export: the one named, otherwise by what OUT ends in. Raises SwquantError for an unknown name."""
    if name is not None:
        if name not in EXPORTS:
            raise SwquantError(f"format {name!r} is not one of: {', '.join(EXPORTS)}")
        return EXPORTS[name]
    return FORMATS["gguf" if out.suffix == ".gguf" else "onnx"]


def _nothing() -> None:
    """Nothing to require."""


def _as_planned(prepared: Prepared, _: Any) -> Prepared:
    """Nothing that cannot be expressed."""
    return prepared


def _with_offsets(name: str, offsets: str, holds: tuple[str, ...]) -> Callable[[CompressOptions, Any], CompressOptions]:
    """The offsets that format `name` holds best, unless they were chosen; see `CompressOptions.suiting`. holds: all
    kinds that it can hold."""

    def suited(options: CompressOptions, _: Any) -> CompressOptions:
        options = options.suiting(offsets)
        if options.offset_kind not in holds:
            raise SwquantError(
                f"--offsets {options.offset_kind}: format {name} holds {' or '.join(holds)}; use one of these"
            )
        return options

    return suited


def _suited_for_checkpoint(options: CompressOptions, export: Any) -> CompressOptions:
    options = _with_offsets("checkpoint", "none", ("none", "float"))(options, export)
    given = "--bits-budget" if options.bits_budget is not None else "--bits-for" if options.bits_for else ""
    if given and not options.symmetric:
        raise SwquantError(
            f"{given} does not go with --asymmetric: stock transformers decodes zero points only with one number of bits "
            "for all weights; use --symmetric"
        )
    return options


def _check_folder(out: Path, overwrite: bool, source: Checkpoint) -> None:
    from swquant.output.destination import check_destination

    check_destination(out, overwrite, source)


def _write_checkpoint(planned: Planned, how: Carrying) -> Compressed:
    from swquant.compress.pipeline import write

    return write(planned.prepared, planned.out, **how)


def _suited_for_onnx(options: CompressOptions, export: ExportOptions) -> CompressOptions:
    """The head is rounded by the export, which has the same option."""
    if options.embedding_bits:
        raise SwquantError(
            f"--embedding-bits {options.embedding_bits}: an ONNX graph holds codes of an output head, and of an embedding "
            "tied to it; use --lm-head-bits"
        )
    options = _with_offsets("onnx", "byte", ("none", "float", "byte"))(options, export)
    return replace(options, lm_head_bits=0)


def _require_onnx() -> None:
    from swquant.models.runtime import require_exporter

    require_exporter()


def _fitted_for_onnx(prepared: Prepared, options: ExportOptions) -> Prepared:
    from swquant.export.onnx.pipeline import check_plan

    check_plan(prepared, options)
    return prepared


def _write_onnx(planned: Planned, how: Carrying) -> Exported:
    from swquant.export.onnx.pipeline import write_exported

    return write_exported(planned.prepared, planned.out, planned.export, **how)


def _export_onnx(checkpoint: CompressedCheckpoint, out: Path, options: ExportOptions, how: Exporting) -> Exported:
    from swquant.export.onnx.pipeline import export_checkpoint

    _say_pool(checkpoint, how["progress"])
    return export_checkpoint(checkpoint, out, options, **how)


def _say_pool(checkpoint: CompressedCheckpoint, progress: Progress) -> None:
    if (pool := checkpoint.manifest.get("pool")) is not None:
        progress.note(f"The sets of the pool stay behind ({', '.join(pool['sets'])}): what is exported is their base")


def _suited_for_gguf(options: CompressOptions, export: GgufOptions) -> CompressOptions:
    from swquant.export.gguf.suiting import suited

    return suited(options, export)


def _check_gguf(out: Path, overwrite: bool, source: Checkpoint) -> None:
    from swquant.export.gguf.file import check_file

    check_file(out, overwrite, source)


def _fitted_for_gguf(prepared: Prepared, options: GgufOptions) -> Prepared:
    from swquant.export.gguf.pipeline import fitted

    return fitted(prepared, options)


def _write_gguf(planned: Planned, how: Carrying) -> Written:
    from swquant.export.gguf.pipeline import Fitted, write_gguf

    overwrite, progress = how["overwrite"], how["progress"]
    assert isinstance(planned.prepared, Fitted)
    return write_gguf(planned.prepared, planned.out, planned.export, overwrite=overwrite, progress=progress)


def _export_gguf(checkpoint: CompressedCheckpoint, out: Path, options: GgufOptions, how: Exporting) -> Written:
    from swquant.export.gguf.pipeline import export_gguf

    _say_pool(checkpoint, how["progress"])
    return export_gguf(checkpoint, out, options, **how)


def _suited_for_mlx(options: CompressOptions, _: Any) -> CompressOptions:
    from swquant.export.mlx.suiting import suited

    return suited(options)


def _fitted_for_mlx(prepared: Prepared, _: Any) -> Prepared:
    from swquant.export.mlx.pipeline import check_plan

    check_plan(prepared)
    return prepared


def _write_mlx(planned: Planned, how: Carrying) -> MlxFolder:
    from swquant.export.mlx.pipeline import write_mlx

    return write_mlx(planned.prepared, planned.out, **how)


def _export_mlx(checkpoint: CompressedCheckpoint, out: Path, _: Any, how: Exporting) -> MlxFolder:
    from swquant.export.mlx.pipeline import export_mlx

    return export_mlx(checkpoint, out, overwrite=how["overwrite"], progress=how["progress"])  # nothing is rounded


_ROWS = (
    Format(
        name="checkpoint",
        text="for transformers and vLLM",
        suffix="",
        options=None,
        suited=_suited_for_checkpoint,
        require=_nothing,
        check_out=_check_folder,
        fitted=_as_planned,
        run=_write_checkpoint,
    ),
    Format(
        name="onnx",
        text="for ONNX Runtime",
        suffix="-onnx",
        options=ExportOptions,
        suited=_suited_for_onnx,
        require=_require_onnx,
        check_out=_check_folder,
        fitted=_fitted_for_onnx,
        run=_write_onnx,
        export=_export_onnx,
    ),
    Format(
        name="gguf",
        text="for llama.cpp",
        suffix=".gguf",
        options=GgufOptions,
        suited=_suited_for_gguf,
        require=_nothing,
        check_out=_check_gguf,
        fitted=_fitted_for_gguf,
        run=_write_gguf,
        export=_export_gguf,
        stock=False,
    ),
    Format(
        name="mlx",
        text="for mlx-lm",
        suffix="-mlx",
        options=None,
        suited=_suited_for_mlx,
        require=_nothing,
        check_out=_check_folder,
        fitted=_fitted_for_mlx,
        run=_write_mlx,
        export=_export_mlx,
    ),
)
FORMATS = {row.name: row for row in _ROWS}
EXPORTS = {row.name: row for row in _ROWS if row.export is not None}
