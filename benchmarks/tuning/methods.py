"""Everything that can be trained: method -> how its model is made, and its grid of learning rates.

recovery, gradient, fisher    blocks, chosen as `swquant tune --select …` does
random, diagonal              controls; diagonal blocks are what DiaBlo trains
scales                        the stored scales and offsets: no bytes at all
full                          every weight of the model: the bound, not at equal bytes
lora … shira-blocks           peft's, see `peers`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from calibrationless import Blocks
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.training.model import lay, trained_parameters
from swquant.tune.plan import nbytes_of
from swquant.tune.selection import chosen, scores
from tuning import peers
from tuning.peers import Trainee
from tuning.results import LADDER, Case
from tuning.world import World

__all__ = ["METHODS", "Method", "missing", "usual_selection"]


@dataclass(frozen=True)
class Method:
    """make: (world, case, seed) -> model and parameters. rates: the grid. needs: the class of peft that it is."""

    make: Callable[[World, Case, int], Trainee]
    rates: tuple[float, ...]
    needs: str | None = None


def usual_selection(case: Case) -> str:
    """What `swquant tune` chooses blocks by, unless told: with the original, or with a text alone."""
    return "recovery" if case.task == "recovery" else "gradient"


def places(world: World, case: Case, select: str, seed: int) -> dict[str, Blocks]:
    """The chosen blocks, as zeros. Their scores are kept: they depend on neither the rate nor the budget."""
    plan, key = world.plan(case), (case.task, case.pool, select, seed)
    if key not in world.selected:
        model = world.fresh()
        losses = world.session(model, case, seed).warmup()
        world.selected[key] = scores(
            select, plan.pool, model, losses, checkpoint=plan.checkpoint, against=world.original, seed=seed
        )
    return chosen(world.selected[key], plan.pool, plan.count)


def blocks(world: World, case: Case, seed: int, *, select: str) -> Trainee:
    plan, found = world.plan(case), places(world, case, select, seed)
    model = world.fresh()
    weights = {name: plan.pool[name].weight for name in found}
    layers = lay(model, plan.checkpoint, weights, found, packed=False)
    nbytes = nbytes_of(sum(map(len, found.values())), plan.options.block)
    return Trainee(model, {name: layer.values for name, layer in layers.items()}, nbytes, found)


def scales(world: World, case: Case, seed: int) -> Trainee:
    plan = world.plan(case)
    if not isinstance(plan.checkpoint, CompressedCheckpoint):
        raise ValueError(f"{plan.checkpoint.name} has no scales")
    model = world.fresh()
    rounded = [name for name in plan.checkpoint.quantized_names if name in plan.pool]
    weights = {name: candidate.weight for name, candidate in plan.pool.items()}
    layers = lay(model, plan.checkpoint, weights, {}, scales=rounded)
    return Trainee(model, trained_parameters(layers), 0, rounds=False)  # they are trained as they are stored


def full(world: World, case: Case, seed: int) -> Trainee:
    model = world.fresh().requires_grad_(True)
    parameters = dict(model.named_parameters())
    return Trainee(model, parameters, 2 * sum(item.numel() for item in parameters.values()))


def shira_blocks(world: World, case: Case, seed: int) -> Trainee:
    return peers.shira_blocks(world, case, seed, places(world, case, usual_selection(case), seed))


def grid(middle: float) -> tuple[float, ...]:
    """A rate and its neighbours on the ladder."""
    at = LADDER.index(middle)
    return LADDER[at - 1 : at + 2]


METHODS = {
    **{name: Method(partial(blocks, select=name), grid(1e-3)) for name in ("recovery", "gradient", "fisher")},
    **{name: Method(partial(blocks, select=name), grid(1e-3)) for name in ("random", "diagonal")},
    "scales": Method(scales, grid(3e-3)),
    "full": Method(full, grid(1e-4)),
    "lora": Method(peers.lora, grid(3e-3), "LoraConfig"),
    "dora": Method(partial(peers.lora, magnitudes=True), grid(3e-3), "LoraConfig"),
    "miss": Method(peers.miss, grid(3e-3), "MissConfig"),
    "shira": Method(peers.shira, grid(3e-3), "ShiraConfig"),
    "shira-blocks": Method(shira_blocks, grid(1e-3), "ShiraConfig"),
    "supertuning": Method(peers.supertuning, grid(3e-3), "SupertuningConfig"),
}


def missing(method: str) -> bool:
    """Whether it is one of peft's that is not installed."""
    needs = METHODS[method].needs
    return needs is not None and not peers.has(needs)
