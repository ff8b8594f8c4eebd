"""Scores of blocks against dense gradients, and the choice among them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import PROMPT, TOKENS, planted_model

import swquant
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.models.architecture import describe
from swquant.training.model import linear_names, trainable_model
from swquant.tune.selection import Candidate, candidates, chosen, scores

TEXTS = [TOKENS, TOKENS.flip(1)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model in float32, its weights that can be patched, and its checkpoint; GPT-2's are stored [in, out]."""
    folder = tmp_path_factory.mktemp("world")
    planted_model(request.param, folder / "m")
    swquant.compress(folder / "m", folder / "c", prompt=PROMPT, block="32", bits=3)
    original, checkpoint = open_checkpoint(folder / "m"), open_checkpoint(folder / "c")
    model = trainable_model(checkpoint)
    return model, linear_names(describe(checkpoint), model), checkpoint, original


def losses(model: Any) -> list[Callable[[], torch.Tensor]]:
    return [lambda ids=ids: model(ids).logits.square().mean() for ids in TEXTS]


def blocks_of(weight: torch.Tensor, side: int) -> torch.Tensor:
    """[block rows, block columns] of sums, by plain loops."""
    rows, cols = -(-weight.shape[0] // side), -(-weight.shape[1] // side)
    sums = [
        [float(weight[r * side : (r + 1) * side, c * side : (c + 1) * side].sum()) for c in range(cols)]
        for r in range(rows)
    ]
    return torch.tensor(sums)


def dense_gradients(model: Any, weights: Any, *texts: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {name: model.get_submodule(weight.module).weight.requires_grad_() for name, weight in weights.items()}
    loss = sum(model(ids).logits.square().mean() for ids in texts)
    found = torch.autograd.grad(loss, parameters.values())
    model.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("side", [16, 24])
def test_gradient_is_the_mean_magnitude_of_the_summed_gradient(world: Any, side: int) -> None:
    model, weights, checkpoint, _ = world
    pool = candidates(checkpoint, weights, side, "all")
    found = scores("gradient", pool, model, losses(model), checkpoint=checkpoint)
    dense = dense_gradients(model, weights, *TEXTS)
    for name in pool:
        expected = blocks_of(dense[name].abs(), side) / side**2
        assert found[name].shape == pool[name].grid
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-9)


def test_fisher_is_the_energy_of_the_gradients_of_single_tokens(world: Any) -> None:
    """For one token a layer's gradient is g x^T, and that is seen where the loss looks at one token of one text."""
    model, weights, checkpoint, _ = world
    side, token = 16, TOKENS[:, :1]
    pool = candidates(checkpoint, weights, side, "all")
    loss = lambda: model(token).logits.square().mean()  # noqa: E731
    found = scores("fisher", pool, model, [loss], checkpoint=checkpoint)
    dense = dense_gradients(model, weights, token)
    for name in pool:
        assert torch.allclose(found[name], blocks_of(dense[name].square(), side), rtol=1e-3, atol=1e-12)
    several = scores("fisher", pool, model, losses(model), checkpoint=checkpoint)
    trace = {
        name: blocks_of(dense_gradients(model, weights, *TEXTS)[name].square(), side).sum() for name in list(pool)[:2]
    }
    assert all(float(several[name].sum()) > 0 for name in trace)


def test_recovery_weighs_it_with_what_rounding_lost(world: Any) -> None:
    model, weights, checkpoint, original = world
    pool = candidates(checkpoint, weights, 16, "all")
    fisher = scores("fisher", pool, model, losses(model), checkpoint=checkpoint)
    found = scores("recovery", pool, model, losses(model), checkpoint=checkpoint, against=original)
    for name in pool:
        ours, theirs = checkpoint.read(name).float(), original.read(name).float()
        if checkpoint.manifest["tensors"][name].get("scaled"):
            continue
        assert torch.allclose(found[name], fisher[name] * blocks_of((ours - theirs).square(), 16), rtol=1e-3)
    with pytest.raises(SwquantError, match="name the original with --against"):
        scores("recovery", pool, model, losses(model), checkpoint=checkpoint)


def test_scaling_is_no_loss(world: Any) -> None:
    """A column that was multiplied by a power of two is compared with the original multiplied by it."""
    _, weights, checkpoint, original = world
    scaled = [name for name in weights if checkpoint.manifest["tensors"][name].get("scaled")]
    if not scaled:
        pytest.skip("nothing was scaled")
    pool = {name: item for name, item in candidates(checkpoint, weights, 16, "all").items() if name in scaled}
    from swquant.tune.selection import _lost

    for name in scaled:
        lost = float(_lost(pool[name], checkpoint, original).sum().sqrt() / checkpoint.read(name).float().norm())
        assert lost < 2 * checkpoint.manifest["tensors"][name]["relative_error"] + 0.05


def test_controls_need_no_gradient(world: Any) -> None:
    model, weights, checkpoint, _ = world
    pool = candidates(checkpoint, weights, 16, "all")
    first, again, other = (scores("random", pool, model, [], checkpoint=checkpoint, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in pool)
    assert any(not torch.equal(first[name], other[name]) for name in pool)
    diagonal = scores("diagonal", pool, model, [], checkpoint=checkpoint)
    for name, score in diagonal.items():
        rows, cols = pool[name].grid
        places = (score >= 0).nonzero()
        assert len(places) == max(rows, cols)
        assert all(abs(int(row) / rows - int(col) / cols) <= 1 / min(rows, cols) for row, col in places)
        assert set(places[:, 0].tolist()) == set(range(rows))
        assert set(places[:, 1].tolist()) == set(range(cols))


def test_pools_are_told_apart(world: Any) -> None:
    _, weights, checkpoint, _ = world
    attention, mlp = (candidates(checkpoint, weights, 16, pool) for pool in ("attention", "mlp"))
    assert set(attention) | set(mlp) == set(weights)
    assert not set(attention) & set(mlp)
    assert all("attn" in name for name in attention)
    assert all("mlp" in name for name in mlp)


def test_the_best_of_all_layers_are_chosen() -> None:
    pool = {name: Candidate(name, None, (20, 30), 10) for name in ("a", "b", "c")}  # type: ignore[arg-type]
    score = {
        "a": torch.tensor([[5.0, 0.0, 1.0], [2.0, 0.0, 0.0]]),
        "b": torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 7.0]]),
        "c": torch.zeros(2, 3),
    }
    blocks = chosen(score, pool, 4)
    assert {name: list(zip(item.rows.tolist(), item.cols.tolist(), strict=True)) for name, item in blocks.items()} == {
        "a": [(0, 0), (0, 2), (1, 0)],
        "b": [(1, 2)],
    }
    assert all(item.values.shape[1:] == (10, 10) and not item.values.any() for item in blocks.values())
    assert sum(map(len, chosen(score, pool, 1000).values())) == 18 - 5
