"""The decision: is a set of the pool reused for a new task, or is a new one grown? By gradients alone (LW2G).

Of every set the gradient that the new task has for its blocks is taken, and the share of it that lies in what the older
tasks of the set made these layers see: that share is lost if they must not be hurt. The base's own text gives the same
for the same gradient, the dynamic threshold: what a step loses that must not hurt the base. Both are counted beyond
chance. The set that hinders least is reused where it hinders less than the threshold; otherwise a set is grown.

    reuse  the task is one that the pool knows: its windows have the key of a set's task, and that set gives at least
           half of what it gave that task
    reuse  the least hindered set, excess below the threshold
    grow   otherwise

The first rule is no part of the paper. The formula alone calls a task that came before the most hindered of all: its
gradient lies where that task's inputs lie. The control of every decision are random bases of the same ranks.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch

from calibrationless.subspaces import shuffled
from exporters.pool_file import BASE, StoredSet
from swquant.adapt.options import AdaptOptions
from swquant.adapt.spaces import gradients_of, hindered
from swquant.adapt.workshop import Workshop
from swquant.checkpoints.pool_schema import DecisionRecord, HindranceRecord
from swquant.models.routing import choose
from swquant.tune.session import Session
from swquant.units import short

__all__ = ["control_of", "decide", "decided", "hindrance_of"]

_SERVED = 0.5  # of what a set gave its own task, which a task that is the same gets from it
_ROOM = 0.05  # of a gradient that has to be left for learning to make sense
Sets = Mapping[str, HindranceRecord]


def decide(shop: Workshop, session: Session, task: str, number: int) -> DecisionRecord:
    """For a task whose text the session has. number: how many tasks came before, which draws random decisions."""
    options, losses = shop.options, session.warmup()
    with torch.no_grad():
        base_loss = float(sum(float(make()) for make in losses) / len(losses))
    judged = shop.sets if options.policy == "lw2g" else {}
    routed = _recognised(shop, session) if judged else {}
    found = {
        name: hindrance_of(shop, session, stored, sum(routed.get(each, 0.0) for each in stored.record["tasks"]))
        for name, stored in judged.items()
    }
    known = _known(shop, found, routed, base_loss)
    action, of_set, reason = decided(options, found, known, list(shop.sets), number)
    control = control_of(options, found, known, list(shop.sets), number) if options.policy == "lw2g" and found else None
    return {
        "action": action,
        "set": of_set or task,
        "reason": reason,
        "policy": options.policy,
        "control": control,
        "base_loss": short(base_loss),
        "sets": found,
    }


def decided(
    options: AdaptOptions, found: Sets, known: str | None, names: list[str], number: int
) -> tuple[Literal["grow", "reuse"], str, str]:
    """(action, the set that is reused, or "", why). known: the set that knows the task."""
    if not names:
        return "grow", "", "the pool is empty"
    if options.policy == "grow":
        return "grow", "", "--policy grow"
    if options.policy == "one":
        return "reuse", names[0], "--policy one"
    if options.policy == "random":
        draw = random.Random(f"{options.seed}/{number}")
        grows = draw.random() < options.growth
        return ("grow", "", "drawn") if grows else ("reuse", draw.choice(names), "drawn")
    if known is not None:
        return "reuse", known, f"its text is that of a task of {known}, which serves it"
    least = min(found, key=lambda name: found[name]["excess"] - _threshold(options, found[name]))
    excess, threshold = found[least]["excess"], _threshold(options, found[least])
    said = f"{least} hinders {excess:.1%} beyond chance, the threshold is {threshold:.1%}"
    if math.sin(math.radians(found[least]["angle"])) ** 2 > 1 - _ROOM:
        return "grow", "", f"{least} leaves less than {_ROOM:.0%} of the gradient"
    return ("reuse", least, said) if excess < threshold else ("grow", "", said)


def control_of(options: AdaptOptions, found: Sets, known: str | None, names: list[str], number: int) -> str:
    """What random spaces of the same ranks decide: their share of the gradient, and the angle that they leave."""
    drawn: Sets = {
        name: {**item, "excess": item["random_excess"], "angle": item["chance"]} for name, item in found.items()
    }
    return "{} {}".format(*decided(options, drawn, known, names, number)[:2]).strip()


def _threshold(options: AdaptOptions, record: HindranceRecord) -> float:
    return record["own_excess"] if options.limit is None else options.limit


def _recognised(shop: Workshop, session: Session) -> dict[str, float]:
    """Task of the pool -> the share of held-out windows that its key takes for its own."""
    keys = shop.keys()
    texts = [ids for ids, _ in session.held.sequences]
    tasks = Counter(choose(keys, shop.model, ids) for ids in texts)
    return {task: count / len(texts) for task, count in tasks.items() if task != BASE}


def _known(shop: Workshop, found: Sets, routed: Mapping[str, float], base_loss: float) -> str | None:
    """The set that knows the task and serves it, None if none does."""
    task = max(routed, key=lambda name: routed[name], default=None)
    if task is None or routed[task] <= 0.5:
        return None
    name = next(of_set for of_set, stored in shop.sets.items() if task in stored.record["tasks"])
    record = shop.sets[name].record["tasks"][task]
    gain = record["base"] - record["after"]
    return name if base_loss - found[name]["loss"] >= _SERVED * gain > 0 else None


def hindrance_of(shop: Workshop, session: Session, stored: StoredSet, recognised: float) -> HindranceRecord:
    """What a set would lose of the task's gradient, and what the base's own text and random bases would take of it."""
    generator = torch.Generator().manual_seed(shop.options.seed)
    with shop.laid(stored.blocks) as layers:
        gradients, loss = gradients_of(layers, session.warmup())
        seen, own = (hindered(layers, gradients, bases) for bases in (stored.seen, stored.own))
        drawn = hindered(layers, gradients, {name: shuffled(item, generator) for name, item in stored.seen.items()})
    return {
        "angle": short(seen.angle, 4),
        "chance": short(seen.chance_angle, 4),
        "excess": short(seen.excess, 4),
        "own_angle": short(own.angle, 4),
        "own_chance": short(own.chance_angle, 4),
        "own_excess": short(own.excess, 4),
        "random_excess": short(drawn.excess, 4),
        "loss": short(loss),
        "recognised": short(recognised, 4),
    }
