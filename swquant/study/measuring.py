"""Measure changed models on windows of text, against the original, each change once.

The numbers are those of `swquant eval`: windows, logits and scores come from `swquant.evaluate`. The original's
logits are computed first and kept, as many windows at a time as fit in memory, and every change is held against them.

Windows run side by side on threads that use one core each. torch would split every single product over the cores and
wait for the slowest, which takes eight times as long when something else uses one of them; and the results would depend
on the number of threads. On a GPU one window follows the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.evaluate.pipeline import Score, score_window, window_logits
from swquant.models.devices import free_memory
from swquant.progress import Progress, silent
from swquant.study.cache import Cache
from swquant.study.changes import Change, original
from swquant.study.subject import Subject

__all__ = ["Measured", "Scores", "measure", "summary_of_time"]

# Share of the free memory that the original's logits may take, and weights that are rounded in a second.
_MEMORY = 0.4
_ROUNDED = 20e6


@dataclass(frozen=True)
class Scores:
    """Sums over each window's predicted tokens: float64 [windows]. mass: float32 [windows, vocabulary], mean
    probability of every token, None where nobody asked for it."""

    tokens: Tensor
    nll: Tensor
    kl: Tensor
    agree: Tensor
    mass: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Scores:
        mass = None if self.mass is None else self.mass[index]
        return Scores(self.tokens[index], self.nll[index], self.kl[index], self.agree[index], mass)


@dataclass(frozen=True)
class Measured:
    """What has been measured: `measured[change]` are the scores of a change."""

    scores: Mapping[str, Scores]
    cache: Cache

    def __getitem__(self, change: Change) -> Scores:
        return self.scores[change.key]

    def remember(self, key: str, observe: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Another observation of the model, made once."""
        tensors = self.cache.get(key)
        if tensors is None:
            tensors = observe()
            self.cache.put(key, tensors)
        return tensors


def _groups(subject: Subject) -> Iterator[range]:
    """Windows whose logits fit in memory together, at least one."""
    vocabulary = subject.model.get_input_embeddings().get_parameter("weight").shape[0]
    budget = _MEMORY * free_memory(subject.model.device)
    start, size = 0, 0.0
    for index, ids in enumerate(subject.windows.ids):
        nbytes = 4 * vocabulary * len(ids)
        if index > start and size + nbytes > budget:
            yield range(start, index)
            start, size = index, 0.0
        size += nbytes
    yield range(start, len(subject.windows.ids))


@dataclass(frozen=True)
class _Reference:
    """The original's logits and the targets of one window."""

    index: int
    logits: Tensor
    targets: Tensor


@torch.no_grad()
def _refer(subject: Subject, index: int) -> _Reference:
    torch.set_num_threads(1)  # here, for some math libraries have one setting for all threads
    return _Reference(index, *window_logits(subject.model, subject.windows.ids[index], subject.windows.bos))


@torch.no_grad()
def _score(subject: Subject, change: Change, reference: _Reference) -> tuple[Score, Tensor | None]:
    torch.set_num_threads(1)
    logits = reference.logits
    if change.key != original().key:
        logits, _ = window_logits(subject.model, subject.windows.ids[reference.index], subject.windows.bos)
    mass = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device) if change.mass else None
    score = score_window(logits, reference.targets, reference.logits, mass)
    return score, None if mass is None else (mass / score.tokens).to(CPU, torch.float32)


def measure(subject: Subject, changes: Iterable[Change], cache: Cache, progress: Progress = silent) -> Measured:
    """Measure every change once, or take it from the cache.

    Raises SwquantError where the original's output on the text is not finite; a change's may be.
    """
    wanted = {change.key: change for change in changes}
    kept = {key: cache.get(key) for key in wanted}
    todo = sorted(
        (wanted[key] for key, tensors in kept.items() if tensors is None), key=lambda change: change.rewritten
    )
    new = _measure(subject, todo, cache, progress) if todo else {}
    return Measured({key: Scores(**(kept[key] or new[key])) for key in wanted}, cache)


def _measure(
    subject: Subject, todo: Sequence[Change], cache: Cache, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    new: dict[str, dict[str, Tensor]] = {}
    scores: dict[str, list[tuple[Score, Tensor | None]]] = {change.key: [] for change in todo}
    threads = torch.get_num_threads()
    told = False
    try:
        with (
            ThreadPoolExecutor(threads if subject.model.device.type == "cpu" else 1) as pool,
            progress.tokens("Measuring", len(todo) * subject.windows.predicted) as bar,
        ):
            groups = list(_groups(subject))
            for group in groups:
                start = time.monotonic()
                references = list(pool.map(lambda index: _refer(subject, index), group))
                _check_finite(subject, references)
                if not told:
                    each = (time.monotonic() - start) * len(subject.windows.ids) / len(group)
                    progress.note(summary_of_time(subject, todo, each))
                    told = True
                for change in todo:
                    torch.set_num_threads(threads)
                    with change.apply(subject):
                        work = lambda reference, change=change: _score(subject, change, reference)  # noqa: E731
                        results = map(work, references) if change.serial else pool.map(work, references)
                        for result in results:
                            scores[change.key].append(result)
                            bar.advance(change.label, result[0].tokens)
                    if group is groups[-1]:
                        new[change.key] = _tensors(scores[change.key])
                        cache.put(change.key, new[change.key])
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also the default of threads to come
    return new


def _check_finite(subject: Subject, references: Sequence[_Reference]) -> None:
    if not all(bool(torch.isfinite(reference.logits).all()) for reference in references):
        raise SwquantError(
            f"{subject.checkpoint.name}: the model's output is NaN or infinite on this text; its weights are damaged"
        )


def _tensors(results: Sequence[tuple[Score, Tensor | None]]) -> dict[str, Tensor]:
    names = ("tokens", "nll", "kl", "agree")
    tensors = {
        name: torch.tensor([getattr(score, name) for score, _ in results], dtype=torch.float64) for name in names
    }
    masses = [mass for _, mass in results if mass is not None]
    return tensors | ({"mass": torch.stack(masses)} if masses else {})


def summary_of_time(subject: Subject, todo: Sequence[Change], seconds: float) -> str:
    """How long the measurements will take, where one pass of the original took `seconds`."""
    # Comparing with the original costs about a third of the pass.
    total = sum(1.35 * seconds * (1.5 if change.serial else 1) + change.rewritten / _ROUNDED for change in todo)
    time_left = f"{total:.0f} seconds" if total < 100 else f"{total / 60:.0f} minutes"
    windows = subject.windows
    return f"{len(todo)} measurements of {windows.predicted:,} tokens in {len(windows.ids)} windows: about {time_left}"
