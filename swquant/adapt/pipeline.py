"""`adapt`, from end to end: the only module that knows the order of things.

    plan -> own text -> for every task: decide (decide), train (learning) -> write (writing)

What an interrupted run has done is kept in the file OUT.adapting beside OUT: the own text, the sets of the tasks that
are done, and of the task at hand the decision, the blocks and the steps. The next run with the same checkpoint, tasks
and options goes on from there, to the same bytes; when OUT is there, the file is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from calibrationless import CPU
from exporters.pool_file import BASE, StoredSet
from swquant.adapt.decide import decide
from swquant.adapt.learning import learn
from swquant.adapt.plan import AdaptPlan
from swquant.adapt.workshop import Workshop
from swquant.adapt.writing import write_pool
from swquant.checkpoints.pool import pool_of
from swquant.checkpoints.pool_schema import DecisionRecord
from swquant.checkpoints.schema import CheckpointManifest
from swquant.checkpoints.tokenizer import begins_with
from swquant.models.routing import Key, key_of
from swquant.output.destination import check_destination
from swquant.parallel import world
from swquant.progress import Progress, silent
from swquant.training.data import own_windows, token_windows
from swquant.training.loop import State, fingerprint_of
from swquant.training.model import place_of, trainable_model

__all__ = ["Adapted", "adapt_checkpoint", "decide_only", "open_workshop"]


@dataclass(frozen=True)
class Adapted:
    """The finished checkpoint and its manifest. sets: task -> the set that serves it, of the tasks of this run."""

    path: Path
    manifest: CheckpointManifest
    sets: dict[str, str]


def adapt_checkpoint(
    plan: AdaptPlan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    device: torch.device = CPU,
) -> Adapted:
    """Carry out a plan, on a device if the model fits there. `out` appears whole or not at all. Raises SwquantError."""
    check_destination(out, overwrite, plan.checkpoint)
    if BASE in plan.sets and not plan.tasks:  # sets come and go, nothing is learned
        limit = pool_of(plan.checkpoint.manifest, plan.checkpoint.name)["limit"]
        return Adapted(out, _written(plan, out, plan.sets, limit, overwrite, progress), {})
    state = State.at(out.with_name(out.name + ".adapting"), _fingerprint(plan, device))
    shop = open_workshop(plan, state, progress, device)
    for number, task in enumerate(plan.tasks, start=plan.before):
        if not any(task.name in stored.keys for stored in shop.sets.values()):
            stored = learn(plan, shop, task, number, state, progress)
            shop.sets[stored.name] = stored
            _remember(state, shop)
    sets = {BASE: _base_set(shop), **shop.sets}
    manifest = _written(plan, out, sets, shop.base_key.limit, overwrite, progress)
    state.remove()
    served = {task: name for name, stored in shop.sets.items() for task in stored.keys}
    return Adapted(out, manifest, {task.name: served[task.name] for task in plan.tasks})


def _written(
    plan: AdaptPlan, out: Path, sets: Mapping[str, StoredSet], limit: float, overwrite: bool, progress: Progress
) -> CheckpointManifest:
    """OUT, by the first of the processes that train together."""
    manifest: CheckpointManifest = world().same(
        lambda: write_pool(plan.checkpoint, out, sets, limit, overwrite=overwrite, progress=progress)
    )
    return manifest


def decide_only(
    plan: AdaptPlan, progress: Progress = silent, *, device: torch.device = CPU
) -> dict[str, DecisionRecord]:
    """Task -> what would be decided about it if it came next; trains and writes nothing. Raises SwquantError."""
    shop = open_workshop(plan, None, progress, device)
    found = {}
    for task in plan.tasks:
        with progress.step(f"Deciding about {task.name}"):
            session = shop.session(*task.corpus.split())
            found[task.name] = world().same(lambda s=session, t=task: decide(shop, s, t.name, plan.before))  # type: ignore[misc]
    return found


def open_workshop(plan: AdaptPlan, state: State | None, progress: Progress, device: torch.device = CPU) -> Workshop:
    """The base, running on a device if it fits there, with the sets of its pool and those of an earlier run's state."""
    saved = {} if state is None else state.saved.tensors
    checkpoint, options = plan.checkpoint, plan.options
    place, said = place_of(checkpoint, device)
    with progress.step(f"Loading {checkpoint.name}{said}"):
        model = trainable_model(checkpoint, place)
    sets = dict(plan.sets)
    base = sets.pop(BASE, None)
    if base is not None and base.text is not None:
        own = token_windows(base.text.long(), "own text")
    else:
        own = own_windows(
            model, begins_with(checkpoint), saved, options.seed, progress,
            texts=options.texts, length=options.window, name="own text",
        )  # fmt: skip
    if state is not None:
        for name, record in state.saved.facts.get("sets", {}).items():
            tensors = {key.partition("|")[2]: item for key, item in saved.items() if key.startswith(f"set/{name}|")}
            sets[name] = StoredSet.of(name, "", record, tensors)
    held = max(len(own) // 4, 1)
    texts = [ids for ids, _ in own.sequences]
    key = key_of(model, texts[held:] or texts, texts[:held], None)
    weights = {name: candidate.weight for name, candidate in plan.candidates.items()}
    return Workshop(model, checkpoint, weights, options, own, key, sets)


def _base_set(shop: Workshop) -> StoredSet:
    """The pool's file of the base: its own text and the key of that."""
    key: Key = shop.base_key
    text = torch.stack([ids for ids, _ in shop.own.sequences]).to(torch.int32)
    return StoredSet(BASE, "", keys={BASE: torch.stack([key.mean, key.spread])}, text=text)


def _remember(state: State, shop: Workshop) -> None:
    """A task is done: its set, with what is known of all, and nothing of the steps that led there."""
    text = {"text": state.saved.tensors["text"]} if "text" in state.saved.tensors else {}
    tensors = {
        f"set/{name}|{key}": item for name, stored in shop.sets.items() for key, item in stored.tensors().items()
    }
    saved = state.saved
    saved.tensors, saved.moments, saved.step, saved.losses = text | tensors, {}, 0, []
    saved.facts = {"sets": {name: dict(stored.record) for name, stored in shop.sets.items()}}
    state.write()


def _fingerprint(plan: AdaptPlan, device: torch.device) -> str:
    """Of all that the result depends on; another kind of device sums up otherwise."""
    digest = hashlib.sha256()
    for task in plan.tasks:
        for ids, counted in task.corpus.sequences:
            digest.update(ids.numpy().tobytes() + counted.numpy().tobytes())
    names = [task.name for task in plan.tasks]
    options = cast(dict[str, object], dict(plan.options.as_dict()))
    sets = {name: dict(stored.record) for name, stored in plan.sets.items()}
    return fingerprint_of(plan.checkpoint.fingerprint, sets, names, digest.hexdigest(), options, device.type)
