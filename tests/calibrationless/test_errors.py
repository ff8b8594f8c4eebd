"""Error figures against numpy in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import dtypes, random_weight

from calibrationless import (
    Block,
    Channel,
    Clip,
    Flat,
    Group,
    Points,
    QuantizedTensor,
    Tile,
    WeightError,
    Whole,
    dequantize,
    measure,
    quantize,
    restore,
    worst,
)

every_kind = st.sampled_from([Group(6), Tile(2, 3), Channel(), Whole(), Flat(12)])


def reference_error(weight: torch.Tensor, decoded: torch.Tensor) -> WeightError:
    original, difference = weight.double().numpy(), weight.double().numpy() - decoded.double().numpy()
    return WeightError(float(np.linalg.norm(difference) / np.linalg.norm(original)), float(np.abs(difference).max()))


def assert_close(found: WeightError, expected: WeightError) -> None:
    assert found.relative == pytest.approx(expected.relative, rel=1e-5, abs=1e-9)
    assert found.largest == pytest.approx(expected.largest, rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 7), every_kind, dtypes, st.integers(2, 8), st.booleans())
@settings(max_examples=60)
def test_measure_is_the_relative_norm_and_the_largest_difference(rows, cols, block, dtype, bits, symmetric):
    weight = random_weight((2 * rows, 6 * cols), seed=cols).to(dtype)
    quantized = quantize(weight, block, bits, symmetric=symmetric)
    expected = reference_error(weight, dequantize(quantized))
    assert_close(measure(weight.clone(), quantized), expected)


@given(every_kind, dtypes, st.integers(1, 40), st.integers(0, 99))
def test_restored_weights_count_as_exact(block, dtype, count, seed):
    weight = random_weight((8, 18), seed).to(dtype)
    quantized = quantize(weight, block, 3, clip=Clip("quantile", 0.9))
    outliers = worst(weight, quantized, count)
    expected = reference_error(weight, restore(dequantize(quantized), outliers))
    assert_close(measure(weight.clone(), quantized, outliers), expected)


@pytest.mark.parametrize("magnitude", [10.0, 500.0, 30000.0])
def test_what_is_left_beside_one_restored_super_weight_is_measured_exactly(magnitude):
    weight = random_weight((64, 64)) * 1e-3
    weight[3, 5] = magnitude
    quantized = quantize(weight, Whole(), 8, clip=Clip("z", 4.0))
    restored = Points.at(weight, torch.tensor([3]), torch.tensor([5]))
    expected = reference_error(weight, restore(dequantize(quantized), restored))
    assert_close(measure(weight.clone(), quantized, restored), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [Group(64), Tile(64, 64), Channel(), Whole(), Flat(80)], ids=str)
def test_measure_leaves_the_weight_as_it_was(block, dtype):
    weight = random_weight((128, 320)).to(dtype)
    before = weight.clone()
    quantized = quantize(weight, block, 4)
    assert measure(weight, quantized) == measure(weight, quantized, worst(weight, quantized, 0))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("largest", [0, -1], ids=["in the first piece", "in the last piece"])
@pytest.mark.parametrize("block", [Group(64), Channel(), Whole()], ids=str)
def test_a_weight_of_several_pieces_is_measured_whole(block, largest):
    weight = random_weight((1031, 640))
    weight[largest, largest] = 40
    quantized = quantize(weight, block, 4, clip=Clip("z", 5.0))
    assert_close(measure(weight.clone(), quantized), reference_error(weight, dequantize(quantized)))


@pytest.mark.parametrize("shape", [(301, 400), (602, 384), (1031, 640)], ids=str)
@pytest.mark.parametrize("block", [Group(8), Channel(), Whole()], ids=str)
def test_the_figures_do_not_depend_on_the_number_of_threads(block, shape):
    weight, threads = random_weight(shape), torch.get_num_threads()
    quantized = quantize(weight, block, 4)
    try:
        torch.set_num_threads(1)
        alone = measure(weight.clone(), quantized)
        torch.set_num_threads(2)
        assert measure(weight.clone(), quantized) == alone
    finally:
        torch.set_num_threads(threads)


def test_the_figures_of_one_enormous_block_do_not_depend_on_it_either():
    codes = torch.full((1, 34_000_000), 8, dtype=torch.uint8)  # its sums have more parts than torch adds on one thread
    quantized, threads = QuantizedTensor(codes, torch.ones(1, 1), None, Whole(), 4), torch.get_num_threads()
    weight = random_weight((1, 34_000_000), seed=5)  # most seeds give equal sums by luck
    weight[0, ::2] *= 0.1
    codes[0, 1::2] = 9
    try:
        torch.set_num_threads(1)
        alone = measure(weight, quantized)
        torch.set_num_threads(2)
        assert measure(weight, quantized) == alone
    finally:
        torch.set_num_threads(threads)


def test_a_tensor_of_zeros_has_no_error():
    weight = torch.zeros(4, 8)
    assert measure(weight, quantize(weight, Channel(), 4)) == WeightError(0.0, 0.0)


def reference_worst(weight: torch.Tensor, quantized: QuantizedTensor, count: int) -> list[tuple[int, int]]:
    """Sorted by error, then by position; the chosen ones in the order of their positions."""
    errors = (weight.float() - dequantize(quantized).float()).abs()
    points = [(row, col) for row in range(weight.shape[0]) for col in range(weight.shape[1])]
    return sorted(sorted(points, key=lambda point: (-errors[point].item(), point))[:count])


def points_of(outliers: Points) -> list[tuple[int, int]]:
    return list(zip(outliers.rows.tolist(), outliers.cols.tolist(), strict=True))


@given(every_kind, dtypes, st.integers(-1, 200), st.integers(0, 99))
def test_worst_names_the_largest_errors(block: Block, dtype, count, seed):
    weight = random_weight((8, 18), seed).to(dtype)
    quantized = quantize(weight, block, 3, symmetric=False)
    outliers = worst(weight, quantized, count)
    assert points_of(outliers) == reference_worst(weight, quantized, max(count, 0))
    assert torch.equal(outliers.values, weight[outliers.rows.long(), outliers.cols.long()])


def test_of_equal_errors_worst_takes_those_that_come_first():
    codes = torch.full((3, 4), 8, dtype=torch.uint8)
    quantized = QuantizedTensor(codes, torch.ones(3, 1), None, Channel(), 4)  # decodes to zeros
    weight = torch.tensor([[0.5, -0.5, 0.1, 0.5], [0.7, 0.5, -0.5, 0.2], [0.5, 0.5, -0.9, 0.5]])
    assert points_of(worst(weight, quantized, 2)) == [(1, 0), (2, 2)]
    assert points_of(worst(weight, quantized, 5)) == [(0, 0), (0, 1), (0, 3), (1, 0), (2, 2)]


def test_what_is_always_kept_comes_before_the_largest_errors():
    weight = random_weight((8, 18), 1)
    quantized = quantize(weight, Channel(), 3)
    always = [(0, 0), (7, 17), (3, 4), (0, 0)]
    largest = set(reference_worst(weight, quantized, 5)) - set(always)
    assert len(largest) == 5  # none of them is kept for its error
    assert set(points_of(worst(weight, quantized, 8, always=always))) == {*always, *largest}
    assert set(points_of(worst(weight, quantized, 3, always=always))) == set(always)
