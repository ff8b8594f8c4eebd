"""The inner loops of the searches, where the tensors are: compiled for the CPU, as batched torch on every other device.

Both take the same arguments and write their results into the tensors that they are given: see `kernels` and
`super_kernels`, which say what each does. They do the same arithmetic in float32 and differ in the order of sums alone.
Of a million random weights in 4 bits, with the energy of a few channels far above the others', 0.3 to 0.5 % of the
codes came out otherwise (0.02 % with offsets), and the error of the output was the same to six digits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["run_loop"]

# Devices whose memory the compiled loops can read.
COMPILED = frozenset({"cpu"})


def run_loop(
    name: Literal["search_blocks", "search_lines", "settle_lines", "settle_super_blocks"],
    device: torch.device,
    *arguments: Any,
) -> None:
    """Call one of the loops with tensors on `device` and numbers. float32 tensors are contiguous."""
    loops: Any
    if device.type in COMPILED:  # imported here: numba takes a second, and plain rounding needs none
        from calibrationless import kernels, super_kernels

        loops = super_kernels if name in super_kernels.__all__ else kernels
        arguments = tuple(value.numpy() if isinstance(value, Tensor) else value for value in arguments)
    else:
        from calibrationless import batched, super_batched

        loops = super_batched if name in super_batched.__all__ else batched
    getattr(loops, name)(*arguments)
