"""Blocks against a loop over every weight, and the fallback against a search over powers of two."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import blocks_that_divide

from calibrationless import (
    Block,
    Channel,
    Flat,
    Group,
    Tile,
    Whole,
    block_elements,
    block_index,
    divides,
    expand,
    fit,
    from_blocks,
    parse_block,
    quantize,
    scale_shape,
    to_blocks,
)

sizes = st.integers(1, 10_000)
any_block = st.one_of(
    st.builds(Group, sizes),
    st.builds(Tile, sizes, sizes),
    st.builds(Flat, sizes),
    st.just(Channel()),
    st.just(Whole()),
)


def reference_place(block: Block, shape: tuple[int, int], row: int, col: int) -> tuple[int, int]:
    """(which block holds the weight, where in the block), from the words of the table in blocks.py."""
    in_features = shape[1]
    match block:
        case Group(size):
            return row * (in_features // size) + col // size, col % size
        case Tile(rows, cols):
            return (row // rows) * (in_features // cols) + col // cols, (row % rows) * cols + col % cols
        case Channel():
            return row, col
        case Whole():
            return 0, row * in_features + col
        case Flat(size):
            return (row * in_features + col) // size, (row * in_features + col) % size


def numbered(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)


@given(blocks_that_divide())
@settings(max_examples=50)
def test_every_weight_is_in_the_block_and_place_that_the_table_says(case):
    block, shape = case
    weight = numbered(shape)
    blocks = to_blocks(weight, block)
    assert tuple(blocks.shape) == (math.prod(scale_shape(block, shape)), block_elements(block, shape))
    for row in range(shape[0]):
        for col in range(shape[1]):
            assert blocks[reference_place(block, shape, row, col)] == weight[row, col]


@given(blocks_that_divide())
@settings(max_examples=50)
def test_from_blocks_undoes_to_blocks(case):
    block, shape = case
    weight = numbered(shape)
    assert torch.equal(from_blocks(to_blocks(weight, block), block, shape), weight)
    columns_first = weight.T.contiguous().T
    assert torch.equal(to_blocks(columns_first, block), to_blocks(weight, block))


@given(blocks_that_divide())
@settings(max_examples=50)
def test_expand_and_block_index_give_every_weight_its_own_blocks_value(case):
    block, shape = case
    scale = torch.randn(scale_shape(block, shape))
    expanded = expand(scale, block, shape)
    assert tuple(expanded.shape) == shape
    rows, cols = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    index = block_index(rows, cols, block, shape)
    assert index.dtype is torch.int64
    for row, col, found in zip(rows.tolist(), cols.tolist(), index.tolist(), strict=True):
        expected, _ = reference_place(block, shape, row, col)
        assert found == expected
        assert expanded[row, col] == scale.flatten()[expected]


@pytest.mark.parametrize(
    ("block", "shape"),
    [(Group(64), (512, 4)), (Tile(128, 32), (4, 8)), (Channel(), (512, 1)), (Whole(), (1, 1)), (Flat(1024), (128,))],
    ids=str,
)
def test_scale_shapes_are_those_of_the_documentation(block, shape):
    assert scale_shape(block, (512, 256)) == shape


@given(blocks_that_divide(), st.booleans())
@settings(max_examples=50)
def test_scale_shape_is_the_shape_that_quantize_returns(case, symmetric):
    block, shape = case
    quantized = quantize(torch.randn(shape), block, 4, symmetric=symmetric)
    assert tuple(quantized.scale.shape) == scale_shape(block, shape)
    if not symmetric:
        assert tuple(quantized.zero_point.shape) == scale_shape(block, shape)


@pytest.mark.parametrize("block", [Group(4), Channel(), Whole(), Flat(16)])
def test_blocks_are_a_view_of_the_weight_unless_they_are_tiles(block):
    weight = numbered((6, 8))
    assert to_blocks(weight, block).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("block", [Group(5), Tile(2, 8), Tile(3, 5), Flat(9)])
def test_a_block_that_does_not_divide_is_refused_with_the_shape(block):
    assert not divides(block, (3, 8))
    with pytest.raises(ValueError, match=rf"{block}.*\[3, 8\]"):
        to_blocks(numbered((3, 8)), block)


@pytest.mark.parametrize(
    ("word", "block"),
    [
        ("128", Group(128)),
        (64, Group(64)),
        ("64x32", Tile(64, 32)),
        ("1X16", Tile(1, 16)),
        (" Channel ", Channel()),
        ("TENSOR", Whole()),
        ("flat:512", Flat(512)),
    ],
)
def test_words_of_the_table_are_understood(word, block):
    assert parse_block(word) == block


@given(any_block)
@settings(max_examples=50)
def test_a_block_is_read_back_from_its_own_word(block):
    assert parse_block(str(block)) == block


OTHER_WORDS = ["", "0", "-128", "+1", "128x", "x128", "0x16", "16x0", "1x2x3", "flat:", "flat:0", "flat:8x8", "chanel"]
OTHER_WORDS += ["12.5", "1e3", "group:128", "128 128", "1_0", "99999999999", "１２８", "None", "128\n64"]


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_other_words_are_answered_with_the_forms(word):
    with pytest.raises(ValueError, match=r"128.*128x128.*channel.*tensor.*flat:512") as error:
        parse_block(word)
    assert repr(word) in str(error.value)


@pytest.mark.parametrize(
    ("block", "shape", "fitted"),
    [
        (Group(128), (49, 576), Group(64)),
        (Group(96), (49, 576), Group(96)),
        (Group(100), (49, 576), Group(64)),
        (Group(128), (49, 48), Group(16)),
        (Group(128), (64, 40), None),
        (Group(128), (64, 545), None),
        (Group(8), (3, 24), Group(8)),
        (Tile(128, 128), (830, 576), Tile(2, 64)),
        (Tile(128, 128), (545, 256), Tile(1, 128)),
        (Tile(64, 128), (128, 576), Tile(64, 64)),
        (Tile(64, 128), (64, 48), Tile(64, 16)),
        (Tile(128, 128), (256, 545), None),
        (Flat(512), (49, 576), Flat(64)),
        (Flat(512), (32, 17), Flat(32)),
        (Flat(512), (49, 545), None),
        (Channel(), (1, 7), Channel()),
        (Whole(), (7, 1), Whole()),
    ],
)
def test_fit_takes_the_block_or_the_largest_power_of_two(block, shape, fitted):
    assert fit(block, shape) == fitted


def reference_fallback(limit: int, number: int) -> int:
    """The largest power of two up to `limit` that divides `number`."""
    return max(2**power for power in range(20) if 2**power <= limit and number % 2**power == 0)


@given(any_block, st.integers(1, 1200), st.integers(1, 1200))
@settings(max_examples=60)
def test_what_fit_returns_divides_and_nothing_larger_would(block, rows, cols):
    shape = (rows, cols)
    fitted = fit(block, shape)
    assert fitted is None or divides(fitted, shape)
    match block:
        case _ if divides(block, shape):
            assert fitted == block
        case Group(size):
            fallback = reference_fallback(size, cols)
            assert fitted == (Group(fallback) if fallback >= 16 else None)
        case Flat(size):
            fallback = reference_fallback(size, rows * cols)
            assert fitted == (Flat(fallback) if fallback >= 16 else None)
        case Tile(tile_rows, tile_cols):
            high = tile_rows if rows % tile_rows == 0 else reference_fallback(tile_rows, rows)
            wide = tile_cols if cols % tile_cols == 0 else reference_fallback(tile_cols, cols)
            kept = cols % tile_cols == 0 or wide >= 16
            assert fitted == (Tile(high, wide) if kept else None)
