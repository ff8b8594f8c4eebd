"""Packing against a bit stream in Python integers and against compressed-tensors' own packer."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import widths

from exporters.packing import pack, packed_words, unpack

every_width = pytest.mark.parametrize("bits", range(2, 9))
SHAPES = [(1, 1), (1, 31), (3, 32), (7, 33), (83, 55), (37, 97), (5, 545), (64, 1), (2, 1024)]


def random_codes(shape: tuple[int, int], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def reference_pack(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """Each row as one long integer, cut into words of 32 bits, lowest first."""
    packed = []
    for row in codes.tolist():
        stream = sum(code << (index * bits) for index, code in enumerate(row))
        words = [(stream >> start) & 0xFFFFFFFF for start in range(0, len(row) * bits, 32)]
        packed.append([word - (1 << 32) if word >> 31 else word for word in words])
    return packed


@given(st.integers(1, 5), st.integers(1, 130), widths, st.integers(0, 99))
@settings(max_examples=60)
def test_code_i_of_a_row_takes_the_bits_from_i_times_b(rows, cols, bits, seed):
    codes = random_codes((rows, cols), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype is torch.int32
    assert packed.shape == (rows, packed_words(cols, bits))
    assert packed.tolist() == reference_pack(codes, bits)


@given(st.integers(1, 5), st.integers(1, 130), widths, st.integers(0, 99))
@settings(max_examples=60)
def test_unpack_undoes_pack(rows, cols, bits, seed):
    codes = random_codes((rows, cols), bits, seed)
    assert torch.equal(unpack(pack(codes, bits), bits, cols), codes)


@every_width
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_words_are_those_of_compressed_tensors(shape, bits):
    codes, middle = random_codes(shape, bits), 1 << (bits - 1)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), signed)


@every_width
def test_all_ones_fill_every_bit_but_the_padding(bits):
    codes = torch.full((2, 37), (1 << bits) - 1, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert sum((word & 0xFFFFFFFF).bit_count() for word in packed[1].tolist()) == 37 * bits
    assert torch.equal(unpack(packed, bits, 37), codes)


@every_width
def test_a_matrix_of_several_pieces_is_packed_as_its_rows_are(bits):
    codes = random_codes((16_500, 65), bits)  # the first 16,131 rows are one piece
    packed = pack(codes, bits)
    for rows in (slice(0, 3), slice(16_125, 16_135), slice(16_490, 16_500)):
        assert torch.equal(packed[rows], pack(codes[rows].clone(), bits))
    assert torch.equal(unpack(packed, bits, 65), codes)


@every_width
def test_the_padding_is_ignored(bits):
    codes = random_codes((3, 7), bits)
    packed = pack(codes, bits)
    used = 7 * bits % 32
    if used:
        packed[:, -1] |= -1 << used
    assert torch.equal(unpack(packed, bits, 7), codes)


@every_width
@pytest.mark.parametrize("cols", [32, 45])
def test_codes_and_words_may_be_views_of_something_larger(cols, bits):
    codes = random_codes((6, cols), bits)
    packed = pack(codes, bits)
    inside = torch.zeros(6 * cols + 1, dtype=torch.uint8)[1:].view(6, cols).copy_(codes)
    assert torch.equal(pack(codes.T.contiguous().T, bits), packed)
    assert torch.equal(unpack(packed.T.contiguous().T, bits, cols), codes)
    assert torch.equal(pack(inside, bits), packed)


@given(st.integers(0, 10_000), widths)
@settings(max_examples=60)
def test_packed_words_are_the_fewest_that_hold_all_bits(count, bits):
    words = packed_words(count, bits)
    assert words * 32 >= count * bits > (words - 1) * 32


def test_another_dtype_or_rank_is_refused_by_name():
    for codes in (torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, 32), torch.zeros(32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=rf"codes must be uint8.*{codes.dtype}"):
            pack(codes, 4)
    for packed in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=rf"int32.*{packed.dtype}"):
            unpack(packed, 4, 32)


@pytest.mark.parametrize("cols", [24, 33, 40, 2**62])
def test_words_that_do_not_hold_the_columns_are_refused_with_the_number_needed(cols):
    with pytest.raises(ValueError, match=f"4 words.*{cols} codes of 4 bits.*{packed_words(cols, 4)}"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), 4, cols)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_widths_outside_two_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits {bits}"):
        pack(torch.zeros(2, 32, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits {bits}"):
        unpack(torch.zeros(2, 4, dtype=torch.int32), bits, 32)
