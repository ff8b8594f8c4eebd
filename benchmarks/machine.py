"""The machine that a benchmark ran on, as far as its numbers depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe"]


def describe() -> dict[str, Any]:
    """Architecture, vector instructions, cores and threads."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in text), None)
    return {
        "architecture": platform.machine(),
        "vectors": vectors,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
