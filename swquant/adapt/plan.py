"""The plan: which tasks, on what text, and how large a set may be. What can be refused is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporters.errors import SwquantError
from exporters.pool_file import BASE, StoredSet
from exporters.sidecar import set_problem
from swquant.adapt.options import AdaptOptions
from swquant.adapt.pool import check_there, import_set, read_pool
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.pool import AUTO
from swquant.checkpoints.tokenizer import context_of
from swquant.models.architecture import describe
from swquant.models.stock import empty_model
from swquant.training.data import Corpus, conversations, text_windows
from swquant.training.model import linear_names
from swquant.tune.plan import nbytes_of
from swquant.tune.selection import Candidate, candidates

__all__ = ["AdaptPlan", "Task", "make_plan", "read_task"]


@dataclass(frozen=True)
class Task:
    """What is to be learned: its name, and the text that it is."""

    name: str
    corpus: Corpus


@dataclass(frozen=True)
class AdaptPlan:
    """What will be done. count, of_blocks: how many blocks a set has, and of how many. left_out: weights that cannot be
    patched -> why. sets: the pool that is there already, `base` among it, without what is dropped and with what is
    imported."""

    checkpoint: CompressedCheckpoint
    options: AdaptOptions
    tasks: tuple[Task, ...]
    candidates: Mapping[str, Candidate]
    left_out: Mapping[str, str]
    count: int
    of_blocks: int
    sets: Mapping[str, StoredSet]

    @property
    def before(self) -> int:
        """How many tasks the pool serves already."""
        return sum(len(stored.record["tasks"]) for name, stored in self.sets.items() if name != BASE)

    @property
    def nbytes(self) -> int:
        """What the blocks of one set take."""
        return nbytes_of(self.count, self.options.block)


def read_task(checkpoint: CompressedCheckpoint, name: str, path: Path, window: int) -> Task:
    """A task from a file: jsonl of prompts and responses, or a text. Raises SwquantError."""
    if path.suffix.lower() == ".jsonl":
        return Task(name, conversations(checkpoint, path, window))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SwquantError(f"{path}: cannot be read ({error.strerror}); give a text, or a .jsonl file") from None
    except UnicodeDecodeError:
        raise SwquantError(f"{path}: not UTF-8 text; give a text, or a .jsonl file") from None
    return Task(name, text_windows(checkpoint, text, window, path.name))


def make_plan(
    checkpoint: Checkpoint,
    tasks: Sequence[tuple[str, Path]],
    options: AdaptOptions,
    *,
    drop: Sequence[str] = (),
    imports: Sequence[Path] = (),
) -> AdaptPlan:
    """Check everything that can be checked before any work. tasks: (name, file) in their order. drop: sets that are
    taken out of the pool, imports: files of sets that are put in, before. Raises SwquantError."""
    if not isinstance(checkpoint, CompressedCheckpoint):
        raise SwquantError(
            f"{checkpoint.name}: not a compressed checkpoint; sets are laid over one: swquant compress MODEL OUT"
        )
    sets = read_pool(checkpoint)
    for name in drop:
        check_there(checkpoint, name)
        sets.pop(name, None)
    for path in imports:
        stored = import_set(checkpoint, sets, path)
        sets[stored.name] = stored
    _check_names([name for name, _ in tasks], sets)
    options = replace(options, window=min(options.window, context_of(checkpoint.config) or options.window))
    read = tuple(read_task(checkpoint, name, path, options.window) for name, path in tasks)
    for task in read:
        task.corpus.split()  # refuses what is too short
    empty = empty_model(checkpoint)
    weights = linear_names(describe(checkpoint, empty), empty)
    pool = candidates(checkpoint, weights, options.block, options.from_)
    reason = "an expert, or a layer with a product of its own"
    left_out = {name: reason for name in checkpoint.quantized_names if name not in weights}
    if not pool:
        raise SwquantError(
            f"{checkpoint.name}: no linear layer to choose blocks from with --from {options.from_}; use all"
        )
    of_blocks = sum(math.prod(candidate.grid) for candidate in pool.values())
    totals = checkpoint.manifest["totals"]
    count = options.training.parsed_budget.blocks(options.block, totals["weights"], totals["quantized_weights"])
    if tasks and count < 1:
        raise SwquantError(
            f"--budget {options.budget} holds no block of {options.block} x {options.block} ({nbytes_of(1, options.block):,} "
            "bytes); give more, or a smaller --block"
        )
    return AdaptPlan(checkpoint, options, read, pool, left_out, min(count, of_blocks), of_blocks, sets)


def _check_names(names: Sequence[str], sets: Mapping[str, StoredSet]) -> None:
    there = {*sets, *(task for stored in sets.values() for task in stored.keys)}
    for place, name in enumerate(names):
        if name in (AUTO, BASE):
            raise SwquantError(f"--task {name}: this name says who answers, not what is learned; give another")
        if problem := set_problem(name):
            raise SwquantError(f"--task: a task cannot be called so: {problem}")
        if name in there or name in names[:place]:
            raise SwquantError(f"--task {name} is there already; give its new text another name")
