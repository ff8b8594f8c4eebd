"""Subspaces: the formula of HFC against a plain reference, its limiting cases, and what chance alone gives."""

import math

import pytest
import torch
from torch import Tensor

from calibrationless.subspaces import (
    Hindrance,
    basis_of,
    hindrance,
    overlap,
    projector,
    ranks,
    second_moment,
    shuffled,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def span(side: int, rank: int, seed: int = 0) -> Tensor:
    """A random orthonormal [side, rank]."""
    return torch.linalg.qr(torch.randn(side, rank, generator=rng(seed), dtype=torch.float64)).Q


def inputs(basis: Tensor, tokens: int = 200, seed: int = 1) -> Tensor:
    """[tokens, side] that lie in a span."""
    return torch.randn(tokens, basis.shape[1], generator=rng(seed), dtype=torch.float64) @ basis.T


def reference(gradient: Tensor, basis: Tensor) -> float:
    """HFC as it is written: the angle in degrees between a gradient and its projection, of one block."""
    projected = gradient.double() - gradient.double() @ basis.double() @ basis.double().T
    cosine = (gradient.double() * projected).sum() / (gradient.double().norm() * projected.norm())
    return math.degrees(math.acos(min(max(float(cosine), -1.0), 1.0)))


@pytest.mark.parametrize(("side", "rank"), [(8, 3), (64, 17), (5, 1), (7, 6)])
def test_hfc_is_the_angle_of_the_paper(side: int, rank: int) -> None:
    gradient = torch.randn(1, 4, side, generator=rng(3))
    basis = span(side, rank).unsqueeze(0)
    assert hindrance([(gradient, basis)]).angle == pytest.approx(reference(gradient[0], basis[0]), abs=1e-6)


def test_a_gradient_in_several_parts_is_one_vector() -> None:
    """Blocks of different ranks and layers of different sides: all entries together."""
    bases = torch.zeros(2, 8, 5)
    bases[0, :, :5], bases[1, :, :2] = span(8, 5).float(), span(8, 2, 4).float()
    gradients = torch.randn(2, 6, 8, generator=rng(5))
    other, wide = torch.randn(1, 3, 16, generator=rng(6)), span(16, 4, 7).unsqueeze(0)
    found = hindrance([(gradients, bases), (other, wide)])
    taken = sum(float((g.double() @ s.double()).square().sum()) for g, s in zip(gradients, bases, strict=True))
    taken += float((other[0].double() @ wide[0]).square().sum())
    total = float(gradients.double().square().sum() + other.double().square().sum())
    assert found.share == pytest.approx(taken / total, abs=1e-9)
    norms = gradients.double().square().sum(dim=(1, 2))
    chance = float(norms[0] * 5 / 8 + norms[1] * 2 / 8 + other.double().square().sum() * 4 / 16) / total
    assert found.chance == pytest.approx(chance, abs=1e-9)


def test_the_same_space_takes_everything_and_an_orthogonal_one_nothing() -> None:
    both = span(32, 12)
    ours, others = both[:, :6], both[:, 6:]
    x = inputs(ours)
    gradient = (torch.randn(200, 9, generator=rng(2), dtype=torch.float64).T @ x).unsqueeze(0)
    same = hindrance([(gradient, ours.unsqueeze(0))])
    assert (same.angle, same.excess) == (pytest.approx(90, abs=1e-4), pytest.approx(1, abs=1e-9))
    apart = hindrance([(gradient, others.unsqueeze(0))])
    assert apart.angle == pytest.approx(0, abs=1e-4)
    assert apart.excess == pytest.approx(-(6 / 32) / (1 - 6 / 32))


@pytest.mark.parametrize("rank", [1, 8, 24, 31])
def test_a_random_space_takes_what_chance_says(rank: int) -> None:
    gradient = torch.randn(40, 3, 32, generator=rng(1))
    drawn = shuffled(torch.ones(40, 32, rank), rng(9))
    found = hindrance([(gradient, drawn)])
    assert found.chance == pytest.approx(rank / 32)
    assert found.share == pytest.approx(rank / 32, abs=0.05)
    assert found.chance_angle == pytest.approx(math.degrees(math.asin(math.sqrt(rank / 32))))


def test_the_whole_space_leaves_nothing_and_no_gradient_is_not_hindered() -> None:
    full = torch.eye(4).unsqueeze(0)
    assert hindrance([(torch.ones(1, 2, 4), full)]).excess == 1.0
    assert hindrance([(torch.zeros(1, 2, 4), full)]) == Hindrance(0.0, 0.0)
    assert hindrance([]) == Hindrance(0.0, 0.0)


# --- bases


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_a_basis_holds_its_energy_with_the_fewest_columns(energy: float) -> None:
    x = torch.randn(3, 500, 16, generator=rng(), dtype=torch.float64) * torch.linspace(3, 0.1, 16)
    moment = second_moment(x)
    assert torch.allclose(moment, torch.einsum("nti,ntj->nij", x, x))
    basis = basis_of(moment, energy).double()
    held = (x @ basis).square().sum(dim=(1, 2)) / x.square().sum(dim=(1, 2))
    assert bool((held >= energy - 1e-6).all())
    for place, rank in enumerate(ranks(basis).tolist()):
        values = torch.linalg.eigvalsh(moment[place]).flip(0)
        assert float(values[: rank - 1].sum() / values.sum()) < energy  # one fewer would not do
        gram = basis[place].T @ basis[place]
        assert torch.allclose(gram, torch.diag((torch.arange(len(gram)) < rank).double()), atol=1e-5)


def test_a_basis_grows_by_what_is_new_and_keeps_what_it_has() -> None:
    both = span(24, 10)
    first, second = second_moment(inputs(both[:, :4])), second_moment(inputs(both[:, 2:10], seed=5))
    old = basis_of(first, 1.0)
    assert int(ranks(old)) == 4
    new = basis_of(second, 1.0, old)
    assert int(ranks(new)) == 10
    assert torch.equal(new[:, :4], old)
    assert torch.allclose(new.double() @ new.double().T, both @ both.T, atol=1e-5)
    assert torch.equal(basis_of(first, 1.0, new), new)  # nothing of it is new


def test_bases_of_different_ranks_lie_side_by_side() -> None:
    moments = torch.stack([second_moment(inputs(span(12, rank, rank))) for rank in (2, 7, 0)])
    basis = basis_of(moments, 1.0)
    assert (tuple(basis.shape), ranks(basis).tolist()) == ((3, 12, 7), [2, 7, 0])
    more = basis_of(moments.flip(0), 1.0, basis)
    assert ranks(more).tolist() == [2, 7, 2]
    assert basis_of(torch.zeros(2, 4, 4), 0.9).shape == (2, 4, 0)


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.01, math.nan])
def test_what_is_no_energy_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="outside 0 to 1"):
        basis_of(torch.eye(3), energy)


def test_a_projected_step_moves_no_output_of_older_inputs() -> None:
    old = inputs(span(16, 5))
    basis = basis_of(second_moment(old), 1.0)
    step = torch.randn(7, 16, generator=rng(4)).double() @ projector(basis.double())
    assert float((old @ step.T).abs().max()) < 1e-4
    assert float(step.norm()) > 1


def test_a_soft_projection_keeps_a_part() -> None:
    basis = span(6, 2)
    inside = torch.randn(3, 2, generator=rng(1), dtype=torch.float64) @ basis.T
    assert torch.allclose(inside @ projector(basis, 0.25), 0.75 * inside)
    assert torch.allclose(inside @ projector(basis, 0.0), inside)


def test_shuffled_keeps_the_ranks_and_nothing_else() -> None:
    basis = basis_of(torch.stack([second_moment(inputs(span(10, rank, rank))) for rank in (2, 6)]), 1.0)
    drawn = shuffled(basis, rng(3))
    assert ranks(drawn).tolist() == [2, 6]
    assert torch.allclose(drawn[1].T @ drawn[1], torch.eye(6), atol=1e-5)
    assert overlap(basis, basis).share == pytest.approx(1, abs=1e-5)
    assert overlap(drawn, basis).share < 0.9
