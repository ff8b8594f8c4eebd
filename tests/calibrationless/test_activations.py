"""INT8 activations against the paper's formulas, written out in double precision; the rule for massive channels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calibrationless import (
    activation_codes,
    activation_scale,
    massive_channels,
    round_activations,
    static_scale,
)

shapes = st.tuples(st.integers(1, 5), st.integers(3, 40))


def activations(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp() * 3).to(dtype)


def paper(values: list[float], kept: set[int]) -> list[float]:
    """RESTORE(Q^-1(Q(REPLACE(values)))) in one loop: symmetric, one scale, the kept values replaced by the median."""
    middle = sorted(values)[(len(values) - 1) // 2]  # torch's median: the lower of the two in the middle
    replaced = [middle if index in kept else value for index, value in enumerate(values)]
    step = max(map(abs, replaced)) / 127 or 1.0
    rounded = [max(-127, min(127, round(value / step))) * step for value in replaced]
    return [value if index in kept else rounded[index] for index, value in enumerate(values)]


@settings(max_examples=60)
@given(shapes, st.integers(0, 10**6), st.integers(0, 3), st.booleans())
def test_rounding_is_the_papers(shape: tuple[int, int], seed: int, kept: int, per_token: bool) -> None:
    x = activations(shape, seed)
    tokens, channels = shape
    assume(2 * kept < channels)  # otherwise the median may be one of those that are replaced
    keep = torch.zeros(shape, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for token in range(tokens):
        keep[token, torch.randperm(channels, generator=generator)[:kept]] = True
    x = torch.where(keep, x * 1000, x)
    rows = list(zip(x, keep, strict=True)) if per_token else [(x.flatten(), keep.flatten())]
    expected = [
        value
        for row, places in rows
        for value in paper(row.double().tolist(), set(places.nonzero().flatten().tolist()))
    ]
    result = round_activations(x, keep, per_token=per_token)
    step = activation_scale(x, keep, per_token=per_token).expand_as(x)
    # A value in the middle between two codes may go either way, by the last digit of the division.
    off = (result.double().flatten() - torch.tensor(expected, dtype=torch.float64)).abs() / step.double().flatten()
    ties = ((x / step).abs() % 1 - 0.5).abs().flatten() < 1e-4
    assert bool((off[~ties] < 1e-4).all())
    assert torch.equal(result[keep], x[keep])


@settings(max_examples=60)
@given(shapes, st.integers(0, 10**6), st.booleans(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_no_value_is_off_by_more_than_half_a_step(
    shape: tuple[int, int], seed: int, per_token: bool, dtype: torch.dtype
) -> None:
    x = activations(shape, seed, dtype)
    result = round_activations(x, per_token=per_token)
    assert result.dtype is dtype
    step = activation_scale(x, per_token=per_token)
    off = (result.float() - x.float()).abs()
    assert bool((off <= step * 0.5001 + x.float().abs() * torch.finfo(dtype).eps).all())


def test_the_scale_does_not_see_what_is_kept() -> None:
    x = activations((4, 32), 0)
    massive = x.clone()
    massive[0, 5] = 3000.0
    keep = torch.arange(32) == 5
    assert torch.equal(
        activation_scale(massive, keep, per_token=False), activation_scale(x.masked_fill(keep, 0), per_token=False)
    )
    plain = (round_activations(massive, per_token=False) - massive).abs()[:, ~keep].max()
    kept = (round_activations(massive, keep, per_token=False) - massive).abs()[:, ~keep].max()
    assert plain > 50 * kept


@pytest.mark.parametrize("per_token", [True, False])
def test_an_integer_product_with_kept_channels_apart_is_the_same(per_token: bool) -> None:
    """What a runtime does: int8 codes times the weight, then the kept channels in float."""
    generator = torch.Generator().manual_seed(3)
    x, weight = activations((6, 48), 1), torch.randint(-127, 128, (16, 48), generator=generator)
    channels = torch.tensor([7, 31])
    x[:, channels] *= 500
    keep = torch.zeros(48, dtype=torch.bool)
    keep[channels] = True
    scale = activation_scale(x, keep, per_token=per_token)
    codes = activation_codes(x.masked_fill(keep, 0), scale)
    integers = codes.to(torch.int32) @ weight.T.to(torch.int32)
    expected = integers * scale.double() + x[:, channels].double() @ weight[:, channels].T.double()
    simulated = round_activations(x, keep, per_token=per_token).double() @ weight.T.double()
    torch.testing.assert_close(simulated, expected, rtol=1e-5, atol=1e-3)


def test_a_static_scale_fits_the_prompt_and_clamps_beyond_it() -> None:
    peaks = torch.tensor([1.0, 900.0, 2.54, 0.5])
    scale = static_scale(peaks, torch.tensor([1]))
    assert scale == pytest.approx(2 * 2.54 / 127)
    keep = torch.tensor([False, True, False, False])
    result = round_activations(torch.tensor([[50.0, 1e6, -2.54, 0.01]]), keep, per_token=False, scale=scale)
    torch.testing.assert_close(result, torch.tensor([[127 * scale, 1e6, -64 * scale, 0.0]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("per_token", [True, False])
def test_zeros_stay_zeros_and_nothing_stays_nothing(per_token: bool) -> None:
    assert not round_activations(torch.zeros(3, 8), per_token=per_token).any()
    assert round_activations(torch.empty(0, 8), per_token=per_token).shape == (0, 8)
    only = torch.zeros(2, 8)
    only[:, 3] = 7.0  # all that there is, is kept
    assert torch.equal(round_activations(only, torch.arange(8) == 3, per_token=per_token), only)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_what_is_not_finite_is_not_made_to_look_sound(bad: float, scale: float | None) -> None:
    x = torch.ones(2, 8)
    x[1, 3] = bad
    assert not bool(torch.isfinite(round_activations(x, per_token=True, scale=scale)[1, 3]))


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(0, 6), st.integers(0, 10**6))
def test_massive_channels_are_the_largest_that_tower_over_the_median(size: int, planted: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    peaks = torch.rand(size, generator=generator) + 0.5  # 0.5 to 1.5: none is massive by itself
    places = torch.randperm(size, generator=generator)[: min(planted, (size - 1) // 2)]
    peaks[places] = 100.0 * 2.0 ** torch.arange(len(places))
    found = massive_channels(peaks)
    assert found.dtype is torch.int32
    assert found.tolist() == sorted(places[-4:].tolist())


def test_a_dead_input_has_no_massive_channels() -> None:
    assert massive_channels(torch.zeros(16)).tolist() == []
