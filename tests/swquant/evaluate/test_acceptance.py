"""The expected acceptance rate is sum min(p, q) of plain softmaxes, and keeps to the bounds that KL divergence sets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swquant.evaluate.pipeline import Score, score_window


def plainly(logits: Tensor, reference: Tensor) -> float:
    """Mean over positions of the shared probability, in float64."""
    p, q = reference.double().softmax(dim=-1), logits.double().softmax(dim=-1)
    return float(torch.minimum(p, q).sum(dim=-1).mean())


def scored(logits: Tensor, reference: Tensor) -> Score:
    targets = torch.zeros(len(logits), dtype=torch.int64)
    return score_window(logits, targets, reference)


def rate(logits: Tensor, reference: Tensor) -> float:
    return scored(logits, reference).accepted / len(logits)


def random_logits(seed: int, spread: float, positions: int = 7, words: int = 11) -> Tensor:
    return spread * torch.randn(positions, words, generator=torch.Generator().manual_seed(seed))


def test_two_tokens_by_hand() -> None:
    """0.9 and 0.1 beside 0.6 and 0.4: 0.6 + 0.1 of every token are shared."""
    assert rate(torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.9, 0.1]]).log()) == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("positions", [1, 127, 128, 300])
def test_it_equals_the_plain_formula_in_pieces_too(positions: int) -> None:
    logits, reference = random_logits(0, 2, positions), random_logits(1, 2, positions)
    assert rate(logits, reference) == pytest.approx(plainly(logits, reference), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_logits_are_read_in_float32(dtype: torch.dtype) -> None:
    logits, reference = random_logits(2, 3).to(dtype), random_logits(3, 3).to(dtype)
    assert rate(logits, reference) == pytest.approx(plainly(logits, reference), abs=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1000.0])
def test_equal_models_accept_everything(spread: float) -> None:
    logits = random_logits(4, spread, words=5003)
    assert rate(logits, logits) == 1.0
    assert rate(logits + 8, logits) == pytest.approx(1.0, abs=1e-4)  # a shift of all logits changes no probability


def test_models_that_share_no_token_accept_nothing() -> None:
    reference = torch.zeros(5, 1000)
    reference[:, 500:] = -200
    assert 0 <= rate(reference.flip(1), reference) < 1e-6


def test_it_is_the_same_either_way_round() -> None:
    logits, reference = random_logits(5, 2), random_logits(6, 2)
    assert rate(logits, reference) == pytest.approx(rate(reference, logits), abs=1e-6)


def test_without_an_original_nothing_is_compared() -> None:
    score = score_window(random_logits(7, 1), torch.zeros(7, dtype=torch.int64))
    assert (score.kl, score.agree, score.accepted) == (0.0, 0, 0.0)


def test_the_logits_stay_as_they_are() -> None:
    logits, reference = random_logits(8, 2), random_logits(9, 2)
    before = logits.clone(), reference.clone()
    scored(logits, reference)
    assert torch.equal(logits, before[0])
    assert torch.equal(reference, before[1])


@given(st.integers(0, 10_000), st.floats(0, 40), st.floats(0, 40), st.integers(1, 9), st.integers(1, 50))
def test_pinsker_bounds_it(seed: int, spread: float, difference: float, positions: int, words: int) -> None:
    """1 - sqrt(KL / 2) at every position, so of the means, too: the root is concave."""
    reference = random_logits(seed, spread, positions, words)
    score = scored(reference + random_logits(seed + 1, difference, positions, words), reference)
    assert 1 - math.sqrt(score.kl / positions / 2) - 1e-3 <= score.accepted / positions <= 1
