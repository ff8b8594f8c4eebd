"""peft's adapters on the same frozen model: LoRA, DoRA, MiSS, SHiRA, and SHiRA where our blocks lie.

Every one lies on all candidates of the case and takes the bytes of the blocks, values at 16 bits; where its sparse
points lie is not counted. LoRA and DoRA fill the budget by a rank of one more in some layers, spread evenly; the ranks
of MiSS and SHiRA are whole numbers for all layers, rounded down. The bytes are in the tables.

Sums over the candidates of `[out, in]` weights: a rank of LoRA and SHiRA takes out + in numbers, DoRA's magnitudes out,
a rank of MiSS out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from calibrationless import Blocks
from tuning.results import Case
from tuning.world import World

__all__ = ["Trainee", "fitting_ranks", "has", "lora", "miss", "shira", "shira_blocks", "supertuning"]


@dataclass(frozen=True)
class Trainee:
    """A model on the world's device and its trained parameters. nbytes: what they take when stored. places: the blocks,
    if it has some. rounds: whether the parameters are stored in bfloat16, and have to be rounded before measuring."""

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    nbytes: int
    places: Mapping[str, Blocks] = field(default_factory=dict)
    rounds: bool = True


def has(config: str) -> bool:
    """Whether the installed peft has this class."""
    if importlib.util.find_spec("peft") is None:
        return False
    import peft

    return hasattr(peft, config)


def _modules(world: World, case: Case) -> dict[str, tuple[int, int]]:
    """Module -> [out, in] of the candidates."""
    found = {}
    for candidate in world.plan(case).pool.values():
        rows, cols = candidate.shape[::-1] if candidate.weight.transposed else candidate.shape
        found[candidate.weight.module] = (rows, cols)
    return found


def _wrapped(world: World, config: Any) -> PreTrainedModel:
    """The model with an adapter in it, its other weights frozen. Not peft's own wrapper: what measures wants a model of
    transformers."""
    from peft import get_peft_model

    return get_peft_model(world.fresh(), config).get_base_model().eval()


def _trainee(model: PreTrainedModel, places: Mapping[str, Blocks] | None = None) -> Trainee:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Trainee(model, parameters, 2 * sum(item.numel() for item in parameters.values()), places or {})


def fitting_ranks(shapes: Mapping[str, tuple[int, int]], numbers: int) -> dict[str, int]:
    """Module -> rank: the same for all, at least 1, and one more in modules spread evenly, as far as so many numbers
    go."""
    of_rank = sum(map(sum, shapes.values()))
    rank, left = divmod(max(numbers, of_rank), of_rank)
    share, before, ranks = left / of_rank, 0.0, {}
    for name in shapes:
        ranks[name] = rank + int(before + share) - int(before)
        before += share
    return ranks


def lora(world: World, case: Case, seed: int, *, magnitudes: bool = False) -> Trainee:
    """LoRA with alpha twice the rank, or DoRA."""
    from peft import LoraConfig

    shapes = _modules(world, case)
    numbers = world.plan(case).nbytes // 2 - (sum(rows for rows, _ in shapes.values()) if magnitudes else 0)
    ranks = fitting_ranks(shapes, numbers)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=min(ranks.values()), lora_alpha=2 * min(ranks.values()), rank_pattern=ranks,
        alpha_pattern={name: 2 * rank for name, rank in ranks.items()}, target_modules=list(shapes),
        lora_dropout=0.0, use_dora=magnitudes,
    )  # fmt: skip
    return _trainee(_wrapped(world, config))


def miss(world: World, case: Case, seed: int) -> Trainee:
    from peft import MissConfig

    shapes = _modules(world, case)
    rank = max(world.plan(case).nbytes // 2 // sum(rows for rows, _ in shapes.values()), 1)
    torch.manual_seed(seed)
    return _trainee(_wrapped(world, MissConfig(r=rank, target_modules=list(shapes))))


def shira(world: World, case: Case, seed: int) -> Trainee:
    """Points at random."""
    from peft import ShiraConfig

    shapes = _modules(world, case)
    rank = max(world.plan(case).nbytes // 2 // sum(map(sum, shapes.values())), 1)
    config = ShiraConfig(r=rank, random_seed=seed, target_modules=list(shapes))
    return _trainee(_wrapped(world, config))


def shira_blocks(world: World, case: Case, seed: int, places: Mapping[str, Blocks]) -> Trainee:
    """Its layers, points and products on the blocks that ours trains. A mask of its own must have r (out + in) points
    in every layer, which blocks chosen over all layers do not; so the points are put in afterwards."""
    from peft import ShiraConfig

    pool = world.plan(case).pool
    modules = {pool[name].weight.module: name for name in places}
    model = _wrapped(world, ShiraConfig(r=1, random_seed=seed, target_modules=list(modules)))
    for module, name in modules.items():
        layer: Any = model.get_submodule(module)
        weight, patch, side = layer.get_base_layer().weight, places[name], pool[name].side
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        for row, col in zip(patch.rows.tolist(), patch.cols.tolist(), strict=True):
            mask[row * side : (row + 1) * side, col * side : (col + 1) * side] = True
        (adapter,) = layer.shira_weight
        layer.shira_indices[adapter] = mask.nonzero().T.to(weight.device, torch.int32)
        layer.shira_weight[adapter] = nn.Parameter(torch.zeros(int(mask.sum()), device=weight.device))
    return _trainee(model, places)


def supertuning(world: World, case: Case, seed: int) -> Trainee:
    """The largest weights."""
    from peft import SupertuningConfig

    shapes = _modules(world, case)
    share = world.plan(case).nbytes / 2 / sum(rows * cols for rows, cols in shapes.values())
    return _trainee(_wrapped(world, SupertuningConfig(sparsity=1 - share, target_modules=list(shapes))))
