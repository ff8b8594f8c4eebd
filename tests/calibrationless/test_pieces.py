"""Work in pieces: every row once, in order, and torch's threads as they were."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrationless import for_pieces, one_thread_per_operation


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


def threads_of(pieces: int) -> set[str]:
    barrier = threading.Barrier(min(pieces, 3), timeout=20)  # nobody takes two before three have one

    def work(piece: slice) -> tuple[str, int]:
        barrier.wait()
        return threading.current_thread().name, torch.get_num_threads()

    found = for_pieces(work, pieces, 1 << 19)
    assert {threads for _, threads in found} == {1}
    return {name for name, _ in found}


def test_operations_take_one_thread_and_pieces_the_others():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread_per_operation():
            assert torch.get_num_threads() == 1
            with one_thread_per_operation():
                assert len(threads_of(3)) == 3
            assert torch.get_num_threads() == 1
            assert len(threads_of(3)) == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
