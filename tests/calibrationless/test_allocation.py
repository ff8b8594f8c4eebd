"""Bits under a budget: never over it, never worse than any allocation of the same sizes and convex losses."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrationless import allocate

groups = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4
)  # (weights, sensitivity)


def choices(weights: int, sensitivity: float, bits: range = range(2, 6)) -> tuple[list[int], list[float]]:
    return [weights * number for number in bits], [sensitivity * 4.0**-number for number in bits]


def best(sizes: list[list[int]], losses: list[list[float]], budget: float) -> float:
    """The smallest loss of all allocations, by trying them."""
    tried = product(*(range(len(group)) for group in sizes))
    fitting = [picks for picks in tried if sum(s[i] for s, i in zip(sizes, picks, strict=True)) <= budget]
    return min(sum(g[i] for g, i in zip(losses, picks, strict=True)) for picks in fitting)


@settings(max_examples=100)
@given(groups, st.floats(0, 1))
def test_the_allocation_fits_and_is_as_good_as_the_best_but_for_one_step(layers, share):
    sizes, losses = map(list, zip(*(choices(*layer) for layer in layers), strict=True))
    smallest, largest = (sum(group[index] for group in sizes) for index in (0, -1))
    budget = smallest + share * (largest - smallest)
    picks = allocate(sizes, losses, budget)
    assert sum(group[i] for group, i in zip(sizes, picks, strict=True)) <= budget
    loss = sum(group[i] for group, i in zip(losses, picks, strict=True))
    optimum = best(sizes, losses, budget)
    # Steps go in the order of what they gain for their size, so only a step that does not fit can be missing.
    step = max(group[0] - group[1] for group in losses)
    assert optimum - 1e-12 <= loss <= optimum + step + 1e-12


@settings(max_examples=100)
@given(st.integers(1, 30), st.integers(1, 5))
def test_equal_groups_get_equal_bits_where_the_budget_allows_it(weights, count):
    sizes, losses = map(list, zip(*[choices(weights, 1.0)] * count, strict=True))
    assert allocate(sizes, losses, count * weights * 4) == [2] * count


def test_the_sensitive_group_gets_more():
    sizes, losses = map(list, zip(choices(10, 1.0), choices(10, 100.0), strict=True))
    insensitive, sensitive = allocate(sizes, losses, 70)
    assert sensitive > insensitive


def test_a_step_that_does_not_fit_leaves_room_for_a_smaller_one():
    assert allocate([[1, 10], [1, 2]], [[9.0, 0.0], [1.0, 0.5]], 5) == [0, 1]
    assert allocate([[1, 2, 10]], [[9.0, 8.0, 0.0]], 5) == [1]


def test_choices_that_gain_nothing_are_not_taken():
    assert allocate([[1, 2]], [[0.0, 0.0]], 100) == [0]


def test_too_small_a_budget_names_the_limit():
    with pytest.raises(ValueError, match="a budget of 3 is below 4"):
        allocate([[2, 3], [2, 3]], [[1.0, 0.0]] * 2, 3)
