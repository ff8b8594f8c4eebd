"""The compiled search against plain torch, and what a search must never do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrationless import (
    Channel,
    Flat,
    Group,
    Tile,
    Whole,
    block_importance,
    dequantize,
    expand,
    quantize,
    scaling_exponents,
    search_scale,
    to_blocks,
    worst,
)
from calibrationless.search import STRETCHES

BLOCKS = [Group(16), Group(64), Tile(4, 32), Channel(), Whole(), Flat(48), Flat(256)]


def reference(block: Tensor, importance: Tensor, bits: int, symmetric: bool) -> float:
    """The least weighted error of one block, in float64 and one trial after the other."""
    w, h = block.double(), importance.double()
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if low == high:
        return 0.0

    def fit(inverse: float, zero: float) -> tuple[float, float]:
        q = torch.clamp(torch.round(w * inverse), -zero, top - zero)
        square = float((h * q * q).sum())
        if square == 0:
            return float("inf"), 0.0
        scale = float((h * w * q).sum()) / square
        return float((h * (w - scale * q) ** 2).sum()), scale

    best = (float("inf"), 0.0, 0.0)
    for stretch in STRETCHES:
        if symmetric:
            inverse = half * stretch / max(high, -low)
            trials = [(inverse, half), (-inverse, half)]
        else:
            inverse = top * stretch / (high - low)
            middle = round((top - (high + low) * inverse) / 2)
            trials = [(inverse, min(max(middle + shift, 0), top)) for shift in (-1, 0, 1)]
        for inverse, zero in trials:
            error, scale = fit(inverse, zero)
            best = min(best, (error, scale, zero))
    for _ in range(2):
        error, scale = fit(1 / best[1], best[2])
        best = min(best, (error, scale, best[2]))
    return best[0]


def weighted(w: Tensor, scale: Tensor, zero: Tensor | None, h: Tensor, bits: int) -> Tensor:
    """Weighted squared error of each block."""
    middle = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
    q = torch.clamp(torch.round(w / torch.where(scale == 0, 1, scale)), -middle, 2**bits - 1 - middle)
    return (h * (w - scale * q).double() ** 2).sum(dim=1)


@settings(max_examples=100)
@given(
    bits=st.integers(2, 8),
    elements=st.sampled_from([1, 7, 16, 33, 128]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_search_is_as_good_as_trying_one_by_one(bits: int, elements: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    blocks = torch.randn(6, elements) * torch.logspace(-6, 3, 6).unsqueeze(1)
    blocks[1] = 0
    blocks[2].abs_()
    importance = torch.rand(3, elements) ** 4 + 1e-6
    scale, zero = search_scale(blocks, importance, 2, bits, symmetric=symmetric)
    h = importance[[2, 0, 1, 2, 0, 1]].double()
    found = weighted(blocks, scale, zero, h, bits)
    for index in range(len(blocks)):
        least = reference(blocks[index], h[index], bits, symmetric)
        total = float((h[index] * blocks[index].double() ** 2).sum())
        # Sums in float32 cannot tell two scales apart whose errors differ by some millionths of the energy.
        assert float(found[index]) <= least * 1.05 + 1e-5 * total


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_weighted_error_is_smaller_than_plain_rounding_s(block, symmetric):
    torch.manual_seed(1)
    weight, energy = torch.randn(12, 192), torch.rand(192) ** 6
    plain = quantize(weight, block, 4, symmetric=symmetric)
    searched = quantize(weight, block, 4, symmetric=symmetric, importance=energy)
    errors = [float((energy * (dequantize(q) - weight) ** 2).sum()) for q in (plain, searched)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_weight_meets_the_importance_of_its_column(block):
    energy = torch.arange(1.0, 193.0)
    pattern = block_importance(energy, block, (12, 192))
    blocks = to_blocks((energy / energy.mean()).expand(12, 192), block)
    assert torch.allclose(pattern[torch.arange(len(blocks)) % len(pattern)], blocks)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_threads_change_nothing(block):
    torch.manual_seed(2)
    weight, energy, threads = torch.randn(768, 768), torch.rand(768), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantize(weight, block, 3, symmetric=False, importance=energy))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scale, results[1].scale)
    assert torch.equal(results[0].zero_point, results[1].zero_point)


def test_a_block_that_keeps_its_extreme_is_rounded_plainly():
    torch.manual_seed(3)
    weight, energy = torch.randn(4, 64), torch.rand(64) ** 6
    keep = torch.tensor([True, False] * 4)
    plain, searched = (
        quantize(weight, Group(32), 4),
        quantize(weight, Group(32), 4, importance=energy, keep_extreme=keep),
    )
    same = (plain.scale == searched.scale).flatten()
    assert torch.equal(same, keep)


@pytest.mark.parametrize(
    "energy",
    [torch.rand(63), torch.full((64,), -1.0), torch.full((64,), torch.nan)],
    ids=["too few", "negative", "NaN"],
)
def test_an_importance_that_is_none_is_refused(energy):
    with pytest.raises(ValueError, match="64 finite numbers from 0"):
        quantize(torch.randn(4, 64), Group(32), 4, importance=energy)


def test_silent_channels_are_still_rounded():
    torch.manual_seed(4)
    weight, energy = torch.randn(8, 64), torch.zeros(64)
    energy[0] = 1.0
    error = dequantize(quantize(weight, Group(64), 4, importance=energy)) - weight
    assert float(error.abs().mean()) < 0.5
    assert torch.equal(
        quantize(weight, Group(64), 4, importance=torch.zeros(64)).codes,
        quantize(weight, Group(64), 4, importance=torch.ones(64)).codes,
    )


def test_outliers_are_the_costliest_weights():
    torch.manual_seed(5)
    weight, energy = torch.randn(32, 64), torch.rand(64) ** 3
    rounded = quantize(weight, Group(32), 3, importance=energy)
    chosen = worst(weight, rounded, 20, importance=energy)
    cost = energy * (dequantize(rounded) - weight) ** 2
    kept = torch.zeros(32, 64, dtype=torch.bool)
    kept[chosen.rows.long(), chosen.cols.long()] = True
    assert int(kept.sum()) == 20
    assert cost[kept].min() >= cost[~kept].max() * (1 - 1e-5)


def test_scales_lie_where_blocks_do():
    torch.manual_seed(6)
    weight = torch.randn(8, 64)
    rounded = quantize(weight, Tile(4, 32), 4, importance=torch.ones(64))
    assert float((expand(rounded.scale, rounded.block, (8, 64)) * 8).abs().min()) > 0.5


def test_exponents_follow_the_energy_and_cancel_out():
    energy = torch.tensor([1.0, 1.0, 1.0, 2.0**8, 2.0**-8, 0.0])
    exponents = scaling_exponents(energy, 0.5)
    assert exponents.dtype is torch.int8
    assert int(exponents[3]) > int(exponents[0]) > int(exponents[4])
    assert scaling_exponents(torch.ones(7)).tolist() == [0] * 7
    assert scaling_exponents(torch.zeros(7)).tolist() == [0] * 7
