"""The inner loops of searching, rounding and measuring: compiled for the CPU, as batched torch on every other device.

Both take the same arguments and write their results into the tensors that they are given: see `kernels`, `passes` and
`super_kernels`, which say what each does. They do the same arithmetic in float32 and differ in the order of sums alone.
Of a million random weights in 4 bits, with the energy of a few channels far above the others', 0.3 to 0.5 % of the
codes came out otherwise (0.02 % with offsets), and the error of the output was the same to six digits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["cut_codes", "run_loop"]

# Devices whose memory the compiled loops can read.
COMPILED = frozenset({"cpu"})


def run_loop(
    name: Literal[
        "block_extremes",
        "cut_blocks",
        "error_sums",
        "search_blocks",
        "search_lines",
        "settle_lines",
        "settle_super_blocks",
    ],
    device: torch.device,
    *arguments: Any,
) -> None:
    """Call one of the loops with tensors on `device` and numbers. float32 tensors are contiguous."""
    loops: Any
    if device.type in COMPILED:  # imported here: numba takes a while, and who reads a plan needs none
        from calibrationless import kernels, passes, super_kernels

        loops = next(module for module in (kernels, passes, super_kernels) if name in module.__all__)
        arguments = tuple(value.numpy() if isinstance(value, Tensor) else value for value in arguments)
    else:
        from calibrationless import batched, super_batched

        loops = super_batched if name in super_batched.__all__ else batched
    getattr(loops, name)(*arguments)


def cut_codes(blocks: Tensor, scale: Tensor, offset: Tensor, zero_point: Tensor, bits: int, out: Tensor) -> None:
    """The codes of float32 [blocks, elements] on each block's line, into uint8 `out`: see `passes.cut_blocks`."""
    run_loop("cut_blocks", blocks.device, blocks.contiguous(), scale, offset, zero_point, 1 << bits, out)
