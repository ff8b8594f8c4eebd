"""One task: the decision, the blocks, the rate, the steps, and what the set knows afterwards.

What is done of it stands in the state of the run, so that the next run goes on from there: the decision and the blocks
before the first step, the steps as the loop counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calibrationless import Blocks
from exporters.pool_file import StoredSet
from swquant.adapt.decide import decide
from swquant.adapt.plan import AdaptPlan, Task
from swquant.adapt.spaces import keep_beside
from swquant.adapt.workshop import Workshop
from swquant.checkpoints.pool_schema import DecisionRecord, PoolSetRecord, TaskRecord
from swquant.models.routing import Key, key_of
from swquant.parallel import world
from swquant.progress import Progress
from swquant.training.loop import Schedule, State, train
from swquant.training.rates import settle
from swquant.tune.plan import nbytes_of
from swquant.tune.selection import chosen, named, scores
from swquant.tune.session import Session
from swquant.units import short

__all__ = ["learn"]


def learn(plan: AdaptPlan, shop: Workshop, task: Task, number: int, state: State, progress: Progress) -> StoredSet:
    """Decide about a task and train it. number: how many came before. Returns the set that serves it, anew or as it is
    now."""
    train_on, held = task.corpus.split()
    session, facts = shop.session(train_on, held), state.saved.facts
    if "decision" not in facts:
        with progress.step(f"Deciding about {task.name}"):
            facts["decision"] = world().same(lambda: decide(shop, session, task.name, number))
            facts["base"] = session.held_out()
    decision: DecisionRecord = facts["decision"]
    if decision["action"] == "reuse":
        old = shop.sets[decision["set"]]
    else:
        old = _grown(plan, shop, session, decision["set"], state, progress)
    blocks, before = _trained(plan, shop, session, old, decision, state, progress)
    with shop.laid(blocks), progress.step(f"Measuring {task.name}"):
        after = session.held_out()
    kept = decision["action"] == "reuse" and not after < before
    if kept:  # what did not help is not taken: the set serves the task as it is
        blocks, after = dict(old.blocks), before
    with shop.laid(blocks):
        seen = shop.spaces(blocks, session.warmup(), old.seen or None)
    texts, unseen = ([ids for ids, _ in corpus.sequences] for corpus in (train_on, held))
    key = key_of(shop.model, texts, unseen, decision["set"])
    record = _task_record(plan, task, facts, session, key, kept=kept, losses=(before, after))
    return _with_task(old, task.name, record, blocks, seen, key)


def _grown(plan: AdaptPlan, shop: Workshop, session: Session, name: str, state: State, progress: Progress) -> StoredSet:
    """A new set without tasks: its blocks, as zeros, and what the base's own text makes their layers see."""
    saved, side = state.saved.tensors, plan.options.block
    if not any(key.startswith("rows/") for key in saved):
        with progress.step("Choosing blocks"):
            found = scores(
                plan.options.select,
                plan.candidates,
                shop.model,
                session.warmup()[world().share(plan.options.training.warmup)],
                checkpoint=plan.checkpoint,
                seed=plan.options.seed,
            )
        saved |= world().same_tensors(lambda: named(chosen(found, plan.candidates, plan.count)))
    weights = [weight for weight in plan.candidates if f"rows/{weight}" in saved]
    blocks = {
        weight: Blocks(rows := saved[f"rows/{weight}"], saved[f"cols/{weight}"], torch.zeros(len(rows), side, side))
        for weight in weights
    }
    own = shop.spaces(blocks, shop.own_losses())
    count = sum(map(len, blocks.values()))
    record: PoolSetRecord = {"block": side, "blocks": count, "bytes": nbytes_of(count, side), "tasks": {}}
    return StoredSet(name, "", dict(record), blocks, own=own)


def _trained(
    plan: AdaptPlan,
    shop: Workshop,
    session: Session,
    old: StoredSet,
    decision: DecisionRecord,
    state: State,
    progress: Progress,
) -> tuple[dict[str, Blocks], float]:
    """(the blocks after training, as they are stored; the held-out loss before). Beside what the older tasks saw,
    unless one set learns everything."""
    options, facts = plan.options, state.saved.facts
    with shop.laid(old.blocks) as layers:
        values, follow = {name: layer.values for name, layer in layers.items()}, _nothing
        beside = decision["action"] == "reuse" and options.policy != "one"
        if beside or options.soft:
            empty = {name: torch.zeros(*own.shape[:2], 0) for name, own in old.own.items()}
            values, follow = keep_beside(layers, old.seen if beside else empty, old.own, options.soft)

        def loss_of(step: int, part: int) -> Tensor:
            follow()
            return session.loss_of(step, part)

        def held_out() -> float:
            follow()
            return session.held_out()

        schedule = Schedule(options.steps, 0.0, tokens=options.batch * options.window)
        if "rate" not in facts:
            facts["before"] = session.held_out()
            settle(options.training.rate, facts, values, loss_of, held_out, schedule, progress, usual=1e-3)
            state.write()
        label = f"Training {decision['set']}"
        train(values, loss_of, replace(schedule, rate=facts["rate"]), state=state, progress=progress, label=label)
        follow()
        return {name: layer.trained(torch.bfloat16) for name, layer in layers.items()}, facts["before"]


def _nothing() -> None:
    """What is trained are the values themselves."""


def _task_record(
    plan: AdaptPlan,
    task: Task,
    facts: Mapping[str, Any],
    session: Session,
    key: Key,
    *,
    kept: bool,
    losses: tuple[float, float],
) -> TaskRecord:
    before, after = losses
    return {
        "data": task.corpus.name,
        "tokens": sum(session.batch_of(step).tokens for step in range(plan.options.steps)),
        "rate": facts["rate"],
        "tried": {rate: None if loss is None else short(loss) for rate, loss in facts["tried"].items()},
        "base": short(facts["base"]),
        "before": short(before),
        "after": short(after),
        "kept": kept,
        "limit": short(key.limit),
        "decision": facts["decision"],
        "options": plan.options.as_dict(),
    }


def _with_task(
    old: StoredSet,
    task: str,
    record: TaskRecord,
    blocks: Mapping[str, Blocks],
    seen: Mapping[str, Tensor],
    key: Key,
) -> StoredSet:
    """A set that serves one task more."""
    tasks = {**old.record["tasks"], task: record}
    keys = {**old.keys, task: torch.stack([key.mean, key.spread])}
    return replace(old, record={**old.record, "tasks": tasks}, blocks=blocks, seen=seen, keys=keys)
