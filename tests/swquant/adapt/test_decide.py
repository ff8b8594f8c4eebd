"""The decision on given numbers, and that it follows the formula: gradients and moments against plain references."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from calibrationless import Blocks
from calibrationless.subspaces import basis_of, second_moment
from exporters.errors import SwquantError
from swquant.adapt.decide import control_of, decided
from swquant.adapt.options import AdaptOptions
from swquant.adapt.spaces import gradients_of, hindered, keep_beside, moments_of
from swquant.adapt.writing import angle_between
from swquant.checkpoints.pool_schema import HindranceRecord
from swquant.models.architecture import LinearKind, LinearWeight
from swquant.training.loop import Schedule, train
from swquant.training.patched_linear import DenseWeight, PatchedLinear


def numbers(excess: float, own: float, angle: float = 40.0, drawn: float = 0.0) -> HindranceRecord:
    return {
        "angle": angle, "chance": 30.0, "excess": excess, "own_angle": 50.0, "own_chance": 30.0, "own_excess": own,
        "random_excess": drawn, "loss": 1.0, "recognised": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sets", "known", "action", "of_set"),
    [
        ({}, {}, None, "grow", ""),
        ({}, {"a": numbers(0.1, 0.2)}, None, "reuse", "a"),
        ({}, {"a": numbers(0.3, 0.2)}, None, "grow", ""),
        ({}, {"a": numbers(0.3, 0.2)}, "a", "reuse", "a"),
        ({}, {"a": numbers(0.1, 0.2), "b": numbers(0.15, 0.4)}, None, "reuse", "b"),
        ({"threshold": "0.12"}, {"a": numbers(0.1, 0.0), "b": numbers(0.15, 0.4)}, None, "reuse", "a"),
        ({"threshold": "0.05"}, {"a": numbers(0.1, 0.9)}, None, "grow", ""),
        ({}, {"a": numbers(0.1, 0.2, angle=80.0)}, None, "grow", ""),
        ({"policy": "grow"}, {"a": numbers(0.1, 0.2)}, "a", "grow", ""),
        ({"policy": "one"}, {"a": numbers(0.9, 0.2), "b": numbers(0.1, 0.2)}, None, "reuse", "a"),
        ({"policy": "random", "growth": 1.0}, {"a": numbers(0.1, 0.2)}, None, "grow", ""),
        ({"policy": "random", "growth": 0.0}, {"a": numbers(0.1, 0.2)}, None, "reuse", "a"),
    ],
    ids=str,
)
def test_the_rules(changes: dict, sets: dict, known: str | None, action: str, of_set: str) -> None:
    assert decided(AdaptOptions(**changes), sets, known, list(sets), 3)[:2] == (action, of_set)


def test_the_control_is_of_random_spaces_alone() -> None:
    """Sets that take nearly all of a gradient are grown beside; random spaces of their ranks take hardly any."""
    found = {"a": numbers(0.97, 0.98, angle=82.0, drawn=0.003), "b": numbers(0.98, 0.99, angle=83.0, drawn=0.002)}
    options = AdaptOptions()
    assert decided(options, found, None, ["a", "b"], 2)[0] == "grow"
    assert control_of(options, found, None, ["a", "b"], 2) == "reuse b"
    assert control_of(options, found, "a", ["a", "b"], 2) == "reuse a"


def test_chance_grows_as_often_as_it_is_told() -> None:
    for growth in (0.2, 0.7):
        options = AdaptOptions(policy="random", growth=growth, seed=4)
        drawn = [decided(options, {}, None, ["a", "b"], number)[:2] for number in range(600)]
        assert sum(action == "grow" for action, _ in drawn) / 600 == pytest.approx(growth, abs=0.06)
        assert {of_set for action, of_set in drawn if action == "reuse"} == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"policy": "best"}, "policy 'best' is not one of"),
        ({"threshold": "2"}, "--threshold '2' is no share"),
        ({"threshold": "nan"}, "is no share"),
        ({"energy": 0.0}, "--energy 0.0 is outside"),
        ({"growth": 1.5}, "--growth 1.5 is outside"),
        ({"lr": "2"}, "--lr '2' is no rate"),
        ({"budget": "a lot"}, "is not understood"),
        ({"steps": 0}, "--steps 0 is outside"),
    ],
    ids=str,
)
def test_nonsense_is_refused(changes: dict, problem: str) -> None:
    with pytest.raises(SwquantError, match=problem):
        AdaptOptions(**changes)


# --- a layer


def layer(side: int = 4) -> tuple[PatchedLinear, Blocks]:
    """12 outputs, 10 inputs: the last column block sticks out."""
    torch.manual_seed(0)
    places = [(0, 2), (1, 0), (2, 2)]
    rows, cols = (torch.tensor(item, dtype=torch.int32) for item in zip(*places, strict=True))
    blocks = Blocks(rows, cols, 0.1 * torch.randn(3, side, side))
    blocks.values[[0, 2], :, 2:] = 0
    return PatchedLinear(DenseWeight(torch.randn(12, 10)), None, blocks), blocks


def weight() -> LinearWeight:
    return LinearWeight("w", LinearKind.LINEAR, 0, "0", "weight", None, False, "w")


def test_moments_and_gradients_are_those_of_the_dense_weight() -> None:
    patched, _ = layer()
    model, x, goal = nn.Sequential(patched), torch.randn(2, 7, 10), torch.randn(2, 7, 12)

    def loss() -> torch.Tensor:
        return (model(x) - goal).square().mean()

    moments = moments_of(model, {"w": (weight(), torch.tensor([0, 2]))}, 4, [loss, loss])["w"]
    wide = nn.functional.pad(x.flatten(0, 1), (0, 2)).double()
    for place, column in enumerate((0, 2)):
        piece = wide[:, column * 4 : column * 4 + 4]
        assert torch.allclose(moments[place], 2 * piece.T @ piece)
    gradients, mean = gradients_of({"w": patched}, [loss, loss])
    assert mean == pytest.approx(float(loss()))
    dense = patched.weight.clone().requires_grad_()
    (x @ dense.T - goal).square().mean().backward()
    assert dense.grad is not None
    whole = nn.functional.pad(dense.grad, (0, 2))
    for place, (row, column) in enumerate(zip(patched.rows.tolist(), patched.cols.tolist(), strict=True)):
        expected = 2 * whole[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert torch.allclose(gradients["w"][place], expected, atol=1e-6)


def test_a_gradient_of_what_was_seen_is_hindered_and_one_of_what_was_not_is_free() -> None:
    patched, _ = layer()
    model, basis = nn.Sequential(patched), torch.linalg.qr(torch.randn(10, 10)).Q
    old = torch.randn(30, 3) @ basis[:, :3].T

    def loss_on(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    seen = {
        "w": basis_of(moments_of(model, {"w": (weight(), torch.tensor([0, 2]))}, 4, [lambda: loss_on(old)])["w"], 1.0)
    }
    same, _ = gradients_of({"w": patched}, [lambda: loss_on(old)])
    assert hindered({"w": patched}, same, seen).angle == pytest.approx(90, abs=0.5)


def test_what_is_trained_beside_a_space_does_not_move_what_lies_in_it() -> None:
    """With AdamW, whose steps are not along the gradient."""
    patched, blocks = layer()
    model = nn.Sequential(patched)
    direction = torch.zeros(2, 10)
    direction[0, :2], direction[1, 8] = torch.tensor([1.0, -2.0]), 1.0
    old = torch.randn(40, 2) @ direction
    seen = basis_of(moments_of(model, {"w": (weight(), torch.tensor([0, 2]))}, 4, [lambda: model(old)])["w"], 1.0)
    before = model(old).detach()
    trained, settle = keep_beside({"w": patched}, {"w": seen}, {"w": seen}, 0.0)
    x, goal = torch.randn(30, 10), torch.randn(30, 12)

    def loss_of(step: int, part: int) -> torch.Tensor:
        settle()
        return (model(x) - goal).square().mean()

    losses = train(trained, loss_of, Schedule(20, 0.05)).losses
    settle()
    assert losses[-1] < losses[0]
    assert torch.allclose(model(old), before, atol=1e-5)
    assert float((patched.trained(torch.float32).values - blocks.values).abs().max()) > 0.05


def test_soft_projection_is_in_between() -> None:
    grown = []
    for soft in (0.0, 0.5, 1.0):
        patched, blocks = layer()
        nothing = {"w": torch.zeros(2, 4, 0)}
        trained, settle = keep_beside({"w": patched}, nothing, {"w": torch.eye(4)[None, :, :2].repeat(2, 1, 1)}, soft)
        trained["w"].data += 1.0
        settle()
        grown.append(patched.trained(torch.float32).values - blocks.values)
    assert torch.allclose(grown[0], torch.ones(3, 4, 4))
    assert torch.allclose(grown[1][..., :2], torch.full((3, 4, 2), 0.5))
    assert torch.allclose(grown[2][..., :2], torch.zeros(3, 4, 2), atol=1e-6)
    assert torch.allclose(grown[2][..., 2:], torch.ones(3, 4, 2))


def test_angles_between_sets_are_those_of_common_inputs(tmp_path: Path) -> None:
    from exporters.pool_file import StoredSet

    x = torch.randn(3, 100, 4)
    bases = [basis_of(second_moment(item), 1.0)[None] for item in (x[0, :1], x[1, :2])]
    cols = torch.zeros(1, dtype=torch.int32)
    one, two = (
        StoredSet(name, "", blocks={"w": Blocks(cols, cols, torch.zeros(1, 4, 4))}, seen={"w": basis})
        for name, basis in zip("ab", bases, strict=True)
    )
    weights = {"w": weight()}
    assert angle_between(one, one, weights) == pytest.approx(0, abs=0.1)
    found = angle_between(one, two, weights)
    cosine = float((bases[0][0].T @ bases[1][0]).norm())
    assert found == pytest.approx(math.degrees(math.acos(cosine)), abs=0.1)
    other = StoredSet("c", "", blocks={"v": one.blocks["w"]}, seen={"v": bases[0]})
    assert angle_between(one, other, weights) is None
