"""How much memory there is, and whether a model fits into it."""

from __future__ import annotations

import torch

from swquant.checkpoints.base import Checkpoint

__all__ = ["fits_in_memory"]


def available_memory() -> int:
    """Bytes that can still be allocated, a container's limit included."""
    import psutil

    return int(psutil.virtual_memory().available)


def fits_in_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the dense model takes at most half of the memory that is free."""
    return sum(stored.numel for stored in checkpoint.tensors.values()) * dtype.itemsize * 2 <= available_memory()
