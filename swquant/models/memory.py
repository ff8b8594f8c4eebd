"""How much memory there is, whether a model fits into it, and what it takes where its weights stay in their files.

    whole model     its weights in float32 and, while it is built, as they are stored, beside what follows
    layer by layer  1 GiB (interpreter, libraries, pieces of tensors) + three times the largest tensor as it is stored;
                    three times the largest layer where the model reads text of its own (a layer's Gram matrices are
                    about twice as large as its weights), and the keys and values of that text while it is written

`benchmarks/memory.py` holds the second to what the kernel says.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.units import human_bytes

__all__ = ["available_memory", "bytes_as", "check_memory", "fits_in_memory", "must_stay_on_disk"]

_GROUP = Path("/sys/fs/cgroup")
_PROGRAM = 1 << 30
_LAYER = re.compile(r".*?\.\d+\.")  # of a tensor's name: what all those of its layer begin with


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


def bytes_as(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Of the dense model, as `dtype` (its own if None)."""
    return sum(stored.numel * (dtype or stored.dtype).itemsize for stored in checkpoint.tensors.values())


def fits_in_memory(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the dense model takes at most half of the memory that is free."""
    return bytes_as(checkpoint, dtype) * 2 <= available_memory()


def check_memory(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Raise SwquantError where the dense model, as `dtype` (its own if None), cannot be in memory: known before$
    reading, and before the system ends the program without a word."""
    import psutil

    needed, free = bytes_as(checkpoint, dtype), available_memory() + int(psutil.swap_memory().free)
    if needed > free:
        raise SwquantError(
            f"{checkpoint.name}: takes {human_bytes(needed)} of memory, {human_bytes(free)} are free; "
            "close other programs, or use a larger machine"
        )


def must_stay_on_disk(checkpoint: Checkpoint, limit: int, *, tokens: int = 0, writes: bool = True) -> bool:
    """Whether weights have to stay in their files for a run to take at most `limit` bytes. tokens: of the text that the
    model reads, 0 for none. writes: whether it writes that text, too. Raises
    SwquantError where the limit is too small for either way."""
    stored = checkpoint.tensors
    layers: Counter[str] = Counter()
    for name, tensor in stored.items():
        layer = _LAYER.match(name) if tokens and ".experts." not in name else None  # they are read one by one
        layers[layer[0] if layer else name] += tensor.nbytes
    least = _PROGRAM + 3 * max(layers.values()) + tokens * _bytes_per_token(checkpoint.config, writes)
    whole = least + bytes_as(checkpoint, torch.float32) + bytes_as(checkpoint, None)
    if limit >= whole:
        return False
    if checkpoint.can_stay_on_disk and limit >= least:
        return True
    needed = least if checkpoint.can_stay_on_disk else whole
    remedy = "give it so much" if checkpoint.can_stay_on_disk else f"safetensors would take {human_bytes(least)}"
    if tokens:
        remedy += ", or fewer --texts"
    raise SwquantError(f"{checkpoint.name}: needs {human_bytes(needed)}, --memory is {human_bytes(limit)}; {remedy}")


def _bytes_per_token(config: Any, writes: bool) -> int:
    """Of a token's hidden states between two layers in float32, or its keys and values while it is written."""
    text = config.get_text_config()
    hidden, layers = (getattr(text, key, 0) or 0 for key in ("hidden_size", "num_hidden_layers"))
    heads = getattr(text, "num_attention_heads", 0) or 1
    head = getattr(text, "head_dim", None) or hidden // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    key, value = (getattr(text, name, None) or head for name in ("qk_head_dim", "v_head_dim"))  # of DeepSeek
    return int(max(layers * kept * (key + value) * writes, 4 * hidden) * torch.float32.itemsize)
