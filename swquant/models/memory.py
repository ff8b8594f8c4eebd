"""How much memory there is, and whether a model fits into it."""

from __future__ import annotations

from pathlib import Path

import torch

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.units import human_bytes

__all__ = ["available_memory", "check_memory", "fits_in_memory"]

_GROUP = Path("/sys/fs/cgroup")


def _left_in_group() -> int | None:
    """Bytes that a container may still take: its limit, less what it holds and cannot give back. None without one."""
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        held = int((_GROUP / "memory.current").read_text())
        words = (_GROUP / "memory.stat").read_text().split()
        files = int(words[words.index("inactive_file") + 1])  # the cache of files that nobody reads just now
        return max(0, int(limit) - held + files)
    except (OSError, ValueError, IndexError):  # no such file system, or of another version
        return None


def available_memory() -> int:
    """Bytes that can still be allocated, a container's limit included."""
    import psutil

    free, left = int(psutil.virtual_memory().available), _left_in_group()
    return free if left is None else min(free, left)


def _bytes_as(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    return sum(stored.numel * (dtype or stored.dtype).itemsize for stored in checkpoint.tensors.values())


def fits_in_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the dense model takes at most half of the memory that is free."""
    return _bytes_as(checkpoint, dtype) * 2 <= available_memory()


def check_memory(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Raise SwquantError where the dense model, as `dtype` (its own if None), cannot be in memory: known before$
    reading, and before the system ends the program without a word."""
    import psutil

    needed, free = _bytes_as(checkpoint, dtype), available_memory() + int(psutil.swap_memory().free)
    if needed > free:
        raise SwquantError(
            f"{checkpoint.name}: takes {human_bytes(needed)} of memory, {human_bytes(free)} are free; "
            "close other programs, or use a larger machine"
        )
