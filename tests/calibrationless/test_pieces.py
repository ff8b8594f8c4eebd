"""Work in pieces: every row once, in order, and torch's threads as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrationless import for_pieces


@given(st.integers(0, 3000), st.sampled_from([0, 1, 1000, 100_000, 1 << 19, 1 << 30]))
def test_the_pieces_cover_every_row_once_and_in_order(rows, elements):
    pieces = for_pieces(lambda piece: list(range(rows)[piece]), rows, elements)
    assert [row for piece in pieces for row in piece] == list(range(rows))
    assert all(len(piece) == 1 or len(piece) * elements <= 1 << 19 for piece in pieces)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_keeps_its_threads_even_after_an_error(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for_pieces(lambda piece: None, 10, 1 << 19)
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            for_pieces(lambda piece: 1 // (piece.start - 7), 10, 1 << 19)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
