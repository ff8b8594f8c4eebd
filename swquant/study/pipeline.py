"""`study`: the super weight paper's experiments on the user's own model, in one report.

    load -> detect -> measure every change once (from the cache where it is known) -> conclude -> report

OUT holds report.html (everything, offline), figures/*.svg, tables/*.csv, study.json, and cache/, from which a second
run, or one that was stopped, takes what it measured already.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.detect.pipeline import find_super_weights
from swquant.drawing.charts import draw, standalone
from swquant.drawing.page import facts, page, section_html
from swquant.drawing.section import Cell, Interval, Section, Table
from swquant.evaluate.pipeline import Windows, fit_window, make_windows
from swquant.models.devices import place_for
from swquant.models.loading import build_model
from swquant.models.memory import available_memory, fits_in_memory
from swquant.output.destination import check_space, write_whole, writing
from swquant.progress import Progress, silent
from swquant.study import activations, amplification, block_size, identify, importance, persistence, stopwords
from swquant.study.cache import Cache
from swquant.study.measuring import measure
from swquant.study.options import EXPERIMENTS, StudyOptions
from swquant.study.subject import Subject
from swquant.study.zero_shot import check_tasks, zero_shot
from swquant.units import human_bytes
from swquant.version import __version__

__all__ = ["Study", "check_study_folder", "study_checkpoint"]

# In the order of EXPERIMENTS, which stands apart because the command line's help does not wait for torch.
_MODULES: Mapping[str, ModuleType] = {
    "identify": identify,
    "importance": importance,
    "persistence": persistence,
    "stopwords": stopwords,
    "amplification": amplification,
    "block-size": block_size,
    "activations": activations,
}
assert tuple(_MODULES) == EXPERIMENTS
# Says, to us and to backup programs, what the folder is: https://bford.info/cachedir/
_TAG, _SIGNATURE = (
    "cache/CACHEDIR.TAG",
    "Signature: 8a477f597d28d172789f06886806bc55\n# Measurements of `swquant study`\n",
)
# Report, figures and tables.
_PAGES = 4_000_000


@dataclass(frozen=True)
class Study:
    """A finished study. record: what study.json holds."""

    path: Path
    sections: tuple[Section, ...]
    record: Mapping[str, Any]


def check_study_folder(out: Path) -> None:
    """Raise SwquantError unless `out` can be created, is empty, or is an earlier study."""
    try:
        ours = not out.exists() or (out.is_dir() and ((out / _TAG).is_file() or not any(out.iterdir())))
    except OSError as error:
        raise SwquantError(f"{out}: cannot be created ({error.strerror}); give another --out") from None
    if not ours:
        raise SwquantError(f"{out}: exists already and is no study; give another --out")


def study_checkpoint(
    checkpoint: Checkpoint,
    text: str,
    out: Path,
    options: StudyOptions,
    *,
    text_name: str = "text",
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Study:
    """Make the experiments and write the report. Raises SwquantError for everything the user can mend.

    What was measured stays in OUT/cache, also when the run is stopped, and is not measured again. device: where the
    model runs and is rounded, if it fits there.
    """
    check_study_folder(out)
    if options.tasks:
        check_tasks(options.tasks)
    windows = _windows(checkpoint, text, options)
    needed = _PAGES + 8 * len(windows.ids) * int(getattr(checkpoint.config.get_text_config(), "vocab_size", 0))
    with writing(out, needed, option="--out"), _said_what_stays(out):
        (out / _TAG).parent.mkdir(parents=True, exist_ok=True)
        check_space(out, needed)
        (out / _TAG).write_text(_SIGNATURE, encoding="utf-8")
        subject = _load(checkpoint, windows, options, device, progress)
        cache = Cache(out / "cache", subject.fingerprint())
        sections = _experiment(subject, cache, options, progress)
        if options.tasks:
            tasks = zero_shot(
                subject, options.tasks, cache, limit=options.task_limit, download=options.download, progress=progress
            )
            sections = (*sections, tasks)
        record = _record(subject, sections, options, text_name)
        _write_all(out, subject, sections, record)
    return Study(out, sections, record)


@contextmanager
def _said_what_stays(out: Path) -> Iterator[None]:
    """Whoever stops the run inside is told."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"what was measured stays in {out} and is used by the next run")
        raise


def _windows(checkpoint: Checkpoint, text: str, options: StudyOptions) -> Windows:
    window = fit_window(checkpoint, options.window)
    windows = make_windows(checkpoint, text, window, options.windows)
    if len(windows.ids[0]) < window:
        raise SwquantError(
            f"the text has {len(windows.ids[0])} tokens, less than one window of {window}; give a longer text, or --window "
            f"{max(2, len(windows.ids[0]) // 4)}"
        )
    return windows


def _load(
    checkpoint: Checkpoint, windows: Windows, options: StudyOptions, device: torch.device, progress: Progress
) -> Subject:
    place, said = place_for(checkpoint, torch.float32, device, copies=2)  # the second is what rounding puts back
    if place.type == "cpu" and not fits_in_memory(checkpoint, torch.float32):  # the factor two is in there
        dense = 4 * sum(stored.numel for stored in checkpoint.tensors.values())
        raise SwquantError(
            f"{checkpoint.name}: a study holds the model twice in float32, {human_bytes(2 * dense)}, but only "
            f"{human_bytes(available_memory())} of memory are free; use a machine with more, or a smaller model"
        )
    with progress.step(f"Loading {checkpoint.name}{said}"):
        model = build_model(checkpoint, torch.float32, place)
    with progress.step(f"Probing {checkpoint.name} with one prompt"):
        found = find_super_weights(checkpoint, options.prompt, model=model)
    return Subject(checkpoint, found, model, windows, options.bits, options.quick)


def _experiment(subject: Subject, cache: Cache, options: StudyOptions, progress: Progress) -> tuple[Section, ...]:
    modules = [_MODULES[name] for name in options.experiments]
    changes = [change for module in modules for change in module.changes(subject)]
    measured = measure(subject, changes, cache, progress)
    with progress.step("Drawing conclusions"):
        return tuple(module.conclude(subject, measured) for module in modules)


def _record(subject: Subject, sections: Sequence[Section], options: StudyOptions, text_name: str) -> dict[str, Any]:
    windows = subject.windows
    return {
        "swquant": __version__,
        "model": subject.checkpoint.name,
        "fingerprint": subject.checkpoint.fingerprint,
        "device": subject.model.device.type,
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()},
        "text": {
            "name": text_name,
            "windows": len(windows.ids),
            "window": len(windows.ids[0]),
            "tokens": windows.predicted,
        },
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "paper": section.paper,
                "finding": section.finding,
                "agrees": section.agrees,
                "notes": list(section.notes),
                "tables": {table.name: _rows(table) for table in section.tables},
            }
            for section in sections
        ],
    }


def _plain(cell: Cell) -> Any:
    """A cell as JSON has it: no NaN, no infinity."""
    if isinstance(cell, Interval):
        return {"value": _plain(cell.value), "low": _plain(cell.low), "high": _plain(cell.high)}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _rows(table: Table) -> list[dict[str, Any]]:
    return [{column: _plain(cell) for column, cell in zip(table.columns, row, strict=True)} for row in table.rows]


def _csv(table: Table) -> str:
    """An interval takes three columns."""
    wide = [any(isinstance(row[index], Interval) for row in table.rows) for index in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head: list[str] = []
    for column, three in zip(table.columns, wide, strict=True):
        head += [column, f"{column} low", f"{column} high"] if three else [column]
    writer.writerow(head)
    for row in table.rows:
        cells: list[Any] = []
        for cell, three in zip(row, wide, strict=True):
            if isinstance(cell, Interval):
                cells += [cell.value, cell.low, cell.high]
            else:
                cells += [cell, None, None] if three else [cell]
        writer.writerow("" if cell is None else cell for cell in cells)
    return buffer.getvalue()


def _html(subject: Subject, sections: Sequence[Section], record: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    text = record["text"]
    name = subject.checkpoint.name
    compared = f"swquant eval MODEL --text TEXT --window {text['window']} --limit {text['windows']}"
    pairs = (
        ("model", f"{name}, {subject.weights:,} weights in linear layers"),
        ("prompt of the detection", subject.found.prompt),
        ("text", f"{text['name']}: {text['tokens']:,} predicted tokens in {text['windows']} windows"),
        ("the same perplexity from", compared),
        ("made with", f"swquant {__version__}"),
    )
    lead = (
        "The experiments of “The Super Weight in Large Language Models” (Yu, Wang, Shan and Wan, 2024), made on this model. "
        "Perplexities depend on the text and on the length of its windows: compare them within this page. Ranges in "
        "parentheses hold 95 % of 2,000 resamplings of the windows.",
    )
    body = [facts(pairs), *(section_html(section, drawn) for section in sections)]
    return page(f"Super weights of {name}", lead, body)


def _write_all(out: Path, subject: Subject, sections: Sequence[Section], record: Mapping[str, Any]) -> None:
    """Everything but the cache. What an earlier run with other options left is removed."""
    drawn = {chart.name: draw(chart) for section in sections for chart in section.charts}
    files = {f"figures/{name}.svg": standalone(svg) for name, svg in drawn.items()}
    files |= {f"tables/{table.name}.csv": _csv(table) for section in sections for table in section.tables}
    files["study.json"] = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files["report.html"] = _html(subject, sections, record, drawn)
    for folder, kind in (("figures", "svg"), ("tables", "csv")):
        (out / folder).mkdir(exist_ok=True)
        for path in (out / folder).glob(f"*.{kind}"):
            if f"{folder}/{path.name}" not in files:
                path.unlink()
    for name, content in files.items():
        write_whole(out / name, content.encode())
