"""Clip rules against their definitions in numpy float64."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrationless import RULES, Clip, clip_threshold, parse_clip

counts = st.sampled_from([1, 2, 3, 4, 5, 16, 31, 64, 127, 545, 4095, 4096, 4097, 8192])


def heavy_tailed(blocks: int, elements: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(blocks, elements, generator=generator) * torch.randn(blocks, elements, generator=generator).exp()


def reference_z(magnitudes: np.ndarray, z: float) -> float:
    mean = sum(magnitudes) / len(magnitudes)
    variance = sum((magnitude - mean) ** 2 for magnitude in magnitudes) / max(len(magnitudes) - 1, 1)
    return mean + z * variance**0.5


def reference_iqr(magnitudes: np.ndarray, factor: float) -> float:
    q1, q3 = np.quantile(magnitudes, [0.25, 0.75])
    return q3 + factor * (q3 - q1)


def reference_quantile(magnitudes: np.ndarray, quantile: str) -> float:
    """Of n magnitudes, the int(n * (1 - q)) largest are cut to the next one (and one at least stays)."""
    cut = int(len(magnitudes) * (1 - Fraction(quantile)))
    return sorted(magnitudes, reverse=True)[min(cut, len(magnitudes) - 1)]


def rows_of(blocks: torch.Tensor) -> np.ndarray:
    return blocks.abs().double().numpy()


@given(st.integers(1, 5), counts, st.sampled_from([0.5, 3.0, 9.0]), st.integers(0, 99))
def test_z_is_the_mean_plus_z_unbiased_deviations_of_the_magnitudes(blocks, elements, z, seed):
    weight = heavy_tailed(blocks, elements, seed)
    expected = [[reference_z(row, z)] for row in rows_of(weight)]
    np.testing.assert_allclose(clip_threshold(weight, Clip("z", z)).numpy(), expected, rtol=1e-6)


@given(st.integers(1, 5), counts, st.sampled_from([0.5, 1.5, 3.0]), st.integers(0, 99))
def test_iqr_is_the_third_quartile_plus_k_interquartile_ranges(blocks, elements, factor, seed):
    weight = heavy_tailed(blocks, elements, seed)
    expected = [[reference_iqr(row, factor)] for row in rows_of(weight)]
    np.testing.assert_allclose(clip_threshold(weight, Clip("iqr", factor)).numpy(), expected, rtol=1e-5)


@given(st.integers(1, 5), counts, st.integers(1, 1000), st.integers(0, 99))
def test_quantile_is_a_magnitude_of_the_block_below_which_nothing_is_cut(blocks, elements, thousandths, seed):
    weight = heavy_tailed(blocks, elements, seed)
    threshold = clip_threshold(weight, Clip("quantile", thousandths / 1000))
    assert threshold.flatten().tolist() == [reference_quantile(row, f"{thousandths}/1000") for row in rows_of(weight)]


@pytest.mark.parametrize(
    ("count", "value", "cut"),
    [(1000, 0.999, 1), (1000, 0.9985, 1), (999, 0.999, 0), (1000, 0.9, 100), (10, 0.7, 3), (8, 1.0, 0), (5, 1e-12, 4)],
)
def test_quantile_cuts_the_number_of_weights_that_its_value_says(count, value, cut):
    weight = torch.arange(1.0, count + 1).unsqueeze(0)
    threshold = clip_threshold(weight, Clip("quantile", value))
    assert int((weight > threshold).sum()) == cut


@pytest.mark.parametrize("clip", [Clip("z", 3.0), Clip("iqr", 3.0), Clip("quantile", 0.9)], ids=str)
@pytest.mark.parametrize("elements", [1, 2, 7, 4096])
def test_a_block_of_equal_magnitudes_is_left_alone(clip, elements):
    signs = torch.tensor([1.0, -1.0]).repeat(elements)[:elements]
    assert clip_threshold(0.375 * signs.unsqueeze(0), clip).item() == 0.375
    assert clip_threshold(torch.zeros(1, elements), clip).item() == 0


@pytest.mark.parametrize("clip", [Clip("z", 3.0), Clip("iqr", 3.0), Clip("quantile", 0.99)], ids=str)
@pytest.mark.parametrize("shape", [(1, 300_001), (1, 4096 * 13), (2, 50_000), (3, 4096 * 9), (400, 300)], ids=str)
def test_a_threshold_does_not_depend_on_the_number_of_threads(clip, shape):
    threads = torch.get_num_threads()
    try:
        for seed in range(12):
            weight = heavy_tailed(*shape, seed).double()  # whose last bits tell
            torch.set_num_threads(1)
            alone = clip_threshold(weight, clip)
            torch.set_num_threads(2)
            assert torch.equal(clip_threshold(weight, clip), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("word", "clip"),
    [
        ("none", None),
        (" None ", None),
        ("z=9", Clip("z", 9.0)),
        ("Z=2.5", Clip("z", 2.5)),
        ("iqr=3", Clip("iqr", 3.0)),
        ("quantile=0.999", Clip("quantile", 0.999)),
        ("quantile=1", Clip("quantile", 1.0)),
    ],
)
def test_words_of_the_table_are_understood(word, clip):
    assert parse_clip(word) == clip


@given(st.sampled_from(list(RULES)), st.floats(1e-6, 1.0, allow_nan=False))
def test_a_clip_is_read_back_from_its_own_word(rule, value):
    assert parse_clip(str(Clip(rule, value))) == Clip(rule, value)


@pytest.mark.parametrize("word", ["", "std=3", "9", "none=1", "=3", "zz=3", "quantile 0.9"])
def test_an_unknown_rule_is_answered_with_the_known_ones(word):
    with pytest.raises(ValueError, match=r"none.*z=9.*iqr=3.*quantile=0.999"):
        parse_clip(word)


@pytest.mark.parametrize("word", ["z", "z=", "z=nine", "iqr=3,5", "quantile=99%"])
def test_a_rule_without_a_number_is_answered_with_an_example(word):
    with pytest.raises(ValueError, match=f"number.*{word[:1]}.*="):
        parse_clip(word)


@pytest.mark.parametrize(
    "word", ["z=0", "z=-1", "z=inf", "z=nan", "z=1e7", "iqr=0", "quantile=0", "quantile=1.01", "quantile=-0.5"]
)
def test_a_value_outside_the_range_is_answered_with_the_range(word):
    name, _, number = word.partition("=")
    with pytest.raises(ValueError, match=f"{name}.*above 0.*at most.*{number}"):
        parse_clip(word)
