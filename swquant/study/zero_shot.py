"""Zero-shot tasks with and without the super weights (the paper's Table 1, right half), by lm-eval as in the paper.

A task is one that lm-eval knows by name, or a task file (YAML) of the user's. Its data must be on this machine: nothing
is fetched unless the user says so. lm-eval is the extra `tasks`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from exporters.errors import SwquantError, first_line
from swquant.drawing.section import Cell, Interval, Section, Table
from swquant.models.loading import quiet
from swquant.progress import Progress
from swquant.study.cache import Cache
from swquant.study.changes import Change, activation_restored, largest_pruned, original, scaled
from swquant.study.importance import MANY, SMALL
from swquant.study.subject import Subject

__all__ = ["changes", "check_tasks", "zero_shot"]

PAPER = (
    "Pruning Llama-7B's one super weight takes the mean accuracy on seven zero-shot tasks from 70.1 to 35.1 %, as good as "
    "guessing; pruning the 7,000 largest other weights takes it to 69.2 % (Table 1)."
)
_Result = dict[str, Interval]


def _is_file(task: str) -> bool:
    """Whether a task is a file of the user's, rather than a name that lm-eval knows."""
    return task.endswith((".yaml", ".yml"))


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise SwquantError unless lm-eval is there and every task is known to it, or is a file."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SwquantError('--tasks needs lm-eval; install it: pip install "swquant[tasks]"') from None
    known = set(TaskManager().all_tasks)
    for task in tasks:
        if _is_file(task):
            if not Path(task).is_file():
                raise SwquantError(f"--tasks {task}: no such file")
        elif task not in known:
            near = sorted(name for name in known if task.lower() in name.lower())[:5]
            hint = f"near it are {', '.join(near)}" if near else "examples are arc_easy, hellaswag, piqa, winogrande"
            raise SwquantError(f"--tasks {task!r} is not a task of lm-eval {version('lm-eval')}; {hint}")


def changes(subject: Subject) -> tuple[Change, ...]:
    """The rows of the table, in its order."""
    weights = subject.super_weights
    pruned = (scaled(0, weights), activation_restored(weights)) if weights else ()
    return (original(), *pruned, largest_pruned(min(MANY, max(1, subject.weights // SMALL))))


@contextmanager
def _offline(download: bool) -> Iterator[None]:
    """Inside, neither datasets nor the hub opens a connection, unless `download` allows it."""
    import datasets
    import huggingface_hub.constants

    places = [(datasets.config, "HF_DATASETS_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    places += [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    try:
        for place, name, value in before:
            setattr(place, name, value or not download)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _run(subject: Subject, task: str, limit: int | None, download: bool) -> _Result:
    """Accuracy of the model as it is now: `task, measure` -> value and 95 % interval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = Path(task) if _is_file(task) else None
    # Quietly: lm-eval prints its settings, and --json owns the standard output.
    with quiet(), _offline(download), open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        manager = TaskManager(verbosity="ERROR", include_path=str(own.parent) if own else None)
        name = _name_of(own) if own else task
        language_model = HFLM(pretrained=subject.model, tokenizer=subject.checkpoint.tokenizer(), batch_size=8)
        results = simple_evaluate(
            model=language_model, tasks=[name], task_manager=manager, limit=limit, verbosity="ERROR", log_samples=False
        )
    return _accuracies(name, results["results"])


def _name_of(path: Path) -> str:
    """The task that a file defines."""
    import yaml

    # Tags such as !function stay unread here; lm-eval resolves them.
    loader: Any = type("Plain", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("!", lambda *_: None)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SwquantError(f"--tasks {path}: not a task file ({first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise SwquantError(f"--tasks {path}: not a task file of lm-eval, it has no `task`")
    return str(content["task"])


def _accuracies(name: str, results: Mapping[str, Mapping[str, Any]]) -> _Result:
    """A group's own line, if it has one, or every task's; accuracy where there is one, else the first measure."""
    rows = {name: results[name]} if name in results else results
    found: _Result = {}
    for task, row in rows.items():
        measures = [
            key
            for key, value in row.items()
            if key.endswith(",none") and isinstance(value, float) and "stderr" not in key
        ]
        key = next((key for key in ("acc,none", *measures) if key in row), None)
        if key is None:
            continue
        measure = key.partition(",")[0]
        value, error = float(row[key]), row.get(f"{measure}_stderr,none")
        spread = 1.96 * error if isinstance(error, float) else None
        found[f"{task}, {measure}"] = (
            Interval(value) if spread is None else Interval(value, max(0.0, value - spread), min(1.0, value + spread))
        )
    return found


def _from_cache(row: torch.Tensor) -> Interval:
    """A value and its ends; NaN stands for an end that there is none of."""
    value, low, high = row.tolist()
    return Interval(value) if math.isnan(low) else Interval(value, low, high)


def _measure(subject: Subject, change: Change, task: str, cache: Cache, limit: int | None, download: bool) -> _Result:
    own = _is_file(task)  # whose data may change under its name: never from the cache
    key = f"task {task}, {limit}, lm-eval {version('lm-eval')}: {change.key}"
    if not own and (known := cache.get(key)) is not None:
        return {name: _from_cache(row) for name, row in known.items()}
    try:
        with change.apply(subject), torch.no_grad():
            result = _run(subject, task, limit, download)
    except SwquantError:
        raise
    except Exception as error:  # whatever a task's data, code or template raises
        remedy = "" if download else "; if its data is not on this machine, --download lets lm-eval fetch it"
        raise SwquantError(f"--tasks {task}: lm-eval cannot run it ({first_line(error)}){remedy}") from None
    if not result:
        raise SwquantError(f"--tasks {task}: lm-eval returned no measure for it; give another task")
    if not own:
        ends = {name: [item.value, item.low, item.high] for name, item in result.items()}
        cache.put(
            key,
            {name: torch.tensor([float("nan") if end is None else end for end in row]) for name, row in ends.items()},
        )
    return result


def zero_shot(
    subject: Subject, tasks: Sequence[str], cache: Cache, *, limit: int | None, download: bool, progress: Progress
) -> Section:
    """Run every task on the original and the pruned models. Raises SwquantError where a task cannot be run."""
    rows: dict[str, _Result] = {}
    for change in changes(subject):
        rows[change.label] = {}
        for task in tasks:
            with progress.step(f"Task {task}: {change.label}"):
                rows[change.label] |= _measure(subject, change, task, cache, limit, download)
    columns = tuple(next(iter(rows.values())))
    means = {label: sum(item.value for item in row.values()) / len(columns) for label, row in rows.items()}
    labels = list(rows)
    finding = "Mean over the tasks: " + ", ".join(f"{label} {100 * mean:.1f} %" for label, mean in means.items()) + "."
    agrees = None
    if subject.super_weights:
        lost, others = (means[labels[0]] - means[labels[index]] for index in (1, -1))
        agrees = lost > others
        if not agrees:
            finding += " The super weights matter no more than the largest others, unlike in the paper."
    table: tuple[tuple[Cell, ...], ...] = tuple((label, *row.values(), means[label]) for label, row in rows.items())
    shown = f"The first {limit} questions of each task" if limit else "All questions"
    return Section(
        name="zero-shot",
        title="Zero-shot tasks",
        paper=PAPER,
        finding=finding,
        agrees=agrees,
        tables=(
            Table(
                "zero-shot",
                f"{shown}, by lm-eval {version('lm-eval')}. In parentheses 95 % intervals over the questions.",
                ("model", *columns, "mean"),
                table,
            ),
        ),
    )
