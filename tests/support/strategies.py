"""What hypothesis draws: blocks with shapes that they divide, widths, dtypes; and the weights of such shapes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from calibrationless import Block, Channel, Flat, Group, Tile, Whole

small = st.integers(1, 12)
widths = st.integers(2, 8)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def blocks_that_divide(draw: st.DrawFn, *, straddling: bool = True) -> tuple[Block, tuple[int, int]]:
    """A block of any kind and a shape that it divides. straddling: also flat blocks that hold parts of two rows."""
    rows, cols, down, across = draw(small), draw(small), draw(st.integers(1, 4)), draw(small)
    height, width = shape = (rows * down, cols * across)
    flats = [size for size in range(1, height * width + 1) if height * width % size == 0]
    whole = [size for size in flats if width % size == 0 or size % width == 0]
    flat = Flat(draw(st.sampled_from(flats if straddling else whole)))
    return draw(st.sampled_from([Group(cols), Tile(rows, cols), Channel(), Whole(), flat])), shape


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
