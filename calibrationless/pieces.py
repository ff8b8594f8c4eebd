"""Work on a large tensor in pieces that fit the cache, one core per piece.

torch splits every single operation over its threads and waits for all of them. A pass of a dozen operations over
hundreds of pieces would wait thousands of times, and each wait costs milliseconds when something else uses a core
(measured: 90 to 9,000 ms for the same 16 million weights). Here a few threads take whole pieces instead, and torch
stays on one thread inside each: as fast on an idle machine, and no slower than its share on a busy one. Results do
not depend on the number of threads, because pieces do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from calibrationless.moving import CPU

__all__ = ["PIECE", "for_pieces", "one_thread_per_operation", "row_sum"]

# Elements per piece: 2 MiB of float32, so that the handful of temporaries stays in the cache.
PIECE = 1 << 19
# And on other devices, whose kernels are each a launch: 1 GiB with the temporaries.
_PIECE_ELSEWHERE = 1 << 25

T = TypeVar("T")

_threads: int | None = None  # of `for_pieces`, where torch's own setting no longer says how many


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Inside, torch runs every operation on one thread, and `for_pieces` alone takes as many as torch had before.

    Threads that wait for the next small operation do so at full speed: compressing a small model took 42 s of processor
    time on a machine with something else to do, 25 s so. May be nested, and used as a decorator."""
    global _threads
    outer, before = _threads, torch.get_num_threads()
    _threads = before if outer is None else outer
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads = outer


def for_pieces(
    work: Callable[[slice], T], rows: int, elements: int, *, device: torch.device = CPU, piece: int = PIECE
) -> list[T]:
    """Call `work` with slices that cover `rows` rows of `elements` elements each. Returns its results in order.

    `work` runs on several threads at once and must touch only its own rows. device: where the rows lie; off the CPU
    pieces are larger, and one follows the other. piece: elements of one on the CPU.
    """
    on_cpu = device.type == "cpu"
    step = max(1, (piece if on_cpu else _PIECE_ELSEWHERE) // max(elements, 1))
    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    before = torch.get_num_threads()
    threads = before if _threads is None else _threads
    if threads == 1 or len(slices) <= 1 or not on_cpu:
        return [work(part) for part in slices]
    try:
        with ThreadPoolExecutor(min(threads, len(slices)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, slices))
    finally:
        torch.set_num_threads(before)  # the workers' setting is also the default of threads to come


def row_sum(matrix: Tensor) -> Tensor:
    """Sum of each row of [rows, elements], float64 [rows, 1], the same for any number of threads.

    Rows are folded by 1024 until one number is left: torch splits a long sum over its threads, a short one never.
    """
    rows = matrix.shape[0]
    sums = matrix
    while sums.shape[1] > 1:
        width = min(1024, sums.shape[1])
        if rest := -sums.shape[1] % width:
            sums = torch.nn.functional.pad(sums, (0, rest))
        sums = sums.view(rows, -1, width).sum(dim=2, dtype=torch.float64)
    return sums.to(torch.float64)
