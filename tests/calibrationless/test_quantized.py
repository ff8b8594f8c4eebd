"""Decoding against compressed-tensors itself, bit for bit; outliers against a loop."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import random_weight

from calibrationless import (
    Channel,
    Group,
    Points,
    QuantizedTensor,
    Tile,
    Whole,
    dequantize,
    expand,
    quantize,
    restore,
)
from exporters.compressed_tensors import to_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stock_decompress(quantized: QuantizedTensor) -> torch.Tensor:
    """What the compressed-tensors package makes of our tensors."""
    grouped = isinstance(quantized.block, Group)
    weights = QuantizationArgs(
        num_bits=quantized.bits,
        type="int",
        symmetric=quantized.symmetric,
        strategy="group" if grouped else "channel",
        group_size=quantized.block.size if grouped else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return PackedQuantizationCompressor.decompress(to_tensors(quantized), scheme)["weight"]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_decoded_weights_equal_a_stock_loaders_bit_for_bit(bits, dtype, symmetric):
    for block, shape in [
        (Group(16), (33, 48)),
        (Group(5), (7, 35)),
        (Group(3), (1, 33)),
        (Channel(), (83, 55)),
        (Channel(), (1, 97)),
        (Channel(), (37, 1)),
    ]:
        quantized = quantize(random_weight(shape), block, bits, symmetric=symmetric, scale_dtype=dtype)
        assert same_bits(dequantize(quantized), stock_decompress(quantized))


def reference_dequantize(quantized: QuantizedTensor) -> torch.Tensor:
    """Element by element in double precision, where the product is exact, rounded once."""
    shape, middle = quantized.shape, 2 ** (quantized.bits - 1)
    scale = expand(quantized.scale, quantized.block, shape)
    zero = torch.full(shape, middle) if quantized.symmetric else expand(quantized.zero_point, quantized.block, shape)
    weight = torch.empty(shape, dtype=scale.dtype)
    for row in range(shape[0]):
        for col in range(shape[1]):
            steps = int(quantized.codes[row, col]) - int(zero[row, col])
            weight[row, col] = steps * scale[row, col].item()
    return weight


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(2, 8), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([Channel(), Whole(), Tile(1, 2), Tile(3, 1)]),
)  # fmt: skip
def test_decoded_weights_equal_a_product_rounded_once(rows, cols, bits, dtype, symmetric, block):
    shape = (3 * rows, 2 * cols)
    quantized = quantize(random_weight(shape), block, bits, symmetric=symmetric, scale_dtype=dtype)
    assert torch.equal(dequantize(quantized), reference_dequantize(quantized))
    for other in (torch.float64, torch.float16, torch.bfloat16):
        assert same_bits(dequantize(quantized, other), dequantize(quantized).to(other))


def test_a_scale_of_another_shape_is_refused_with_the_shape_that_is_needed():
    with pytest.raises(ValueError, match=r"\[4, 3\].*block 16.*\[4, 32\].*\[4, 2\]"):
        QuantizedTensor(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 3), None, Group(16), 4)


def test_a_zero_point_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="zero"):
        QuantizedTensor(
            torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8), Group(16), 4
        )


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_that_codes_cannot_have_is_refused(bits):
    with pytest.raises(ValueError, match=f"bits {bits} is outside 2 to 8"):
        QuantizedTensor(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 1), None, Channel(), bits)


@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from(DTYPES), st.data())
def test_outliers_are_sorted_by_position_without_duplicates(rows, cols, dtype, data):
    weight = random_weight((rows, cols)).to(dtype)
    points = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1)), max_size=20))
    wanted = torch.tensor(points, dtype=torch.int32).reshape(-1, 2)
    outliers = Points.at(weight, wanted[:, 0], wanted[:, 1])
    expected = sorted(set(points))
    assert list(zip(outliers.rows.tolist(), outliers.cols.tolist(), strict=True)) == expected
    assert outliers.values.tolist() == [weight[point].item() for point in expected]
    assert len(outliers) == len(expected)
    assert (outliers.rows.dtype, outliers.cols.dtype, outliers.values.dtype) == (torch.int32, torch.int32, dtype)


def test_outliers_keep_their_values_when_the_weight_changes():
    weight = torch.ones(2, 3)
    outliers = Points.at(weight, torch.tensor([1]), torch.tensor([2]))
    weight.zero_()
    assert outliers.values.tolist() == [1]


@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from(DTYPES), st.integers(0, 30), st.integers(0, 99))
def test_restore_makes_the_outliers_exact_and_touches_nothing_else(rows, cols, dtype, count, seed):
    weight = random_weight((rows, cols), seed).to(dtype)
    decoded = dequantize(quantize(weight, Channel(), 2))
    index = torch.randint(rows * cols, (count,), generator=torch.Generator().manual_seed(seed))
    outliers = Points.at(weight, index // cols, index % cols)
    restored = restore(decoded.clone(), outliers)
    chosen = torch.zeros(rows, cols, dtype=torch.bool)
    chosen.view(-1)[index] = True
    assert torch.equal(restored, torch.where(chosen, weight, decoded))


def test_restore_works_in_place_and_casts_to_the_weights_dtype():
    weight = torch.zeros(3, 4, dtype=torch.bfloat16)
    outliers = Points(torch.tensor([2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32), torch.tensor([1.7]))
    assert restore(weight, outliers) is weight
    assert weight[2, 3] == torch.tensor(1.7).bfloat16()


@pytest.mark.parametrize(
    ("row", "col", "what"),
    [(-1, 0, "row.*0 .. 2"), (3, 0, "row.*0 .. 2"), (0, -1, "column.*0 .. 4"), (0, 5, "column.*0 .. 4")],
)
def test_a_coordinate_outside_the_weight_is_refused_before_anything_is_written(row, col, what):
    weight = torch.zeros(3, 5)
    rows, cols = torch.tensor([1, row], dtype=torch.int32), torch.tensor([1, col], dtype=torch.int32)
    with pytest.raises(ValueError, match=what):
        restore(weight, Points(rows, cols, torch.ones(2)))
    assert bool((weight == 0).all())
