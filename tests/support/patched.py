"""Blocks laid over a checkpoint without training them, and what a manifest says of them."""

from __future__ import annotations

from typing import Any

import torch

from calibrationless import Blocks
from swquant.checkpoints.schema import TuneOptionsRecord, TuningRecord

OPTIONS: TuneOptionsRecord = {
    "budget": "1%", "block": 16, "select": None, "from_": "all", "warmup": 1, "steps": 1, "lr": "auto", "batch": 1,
    "window": 8, "texts": 1, "precision": "float32", "seed": 0,
}  # fmt: skip


def record(blocks: dict[str, Blocks]) -> TuningRecord:
    return {
        "base": "", "against": None, "data": "x", "options": OPTIONS, "blocks": sum(map(len, blocks.values())),
        "bytes": sum(patch.values.nbytes + patch.rows.nbytes + patch.cols.nbytes for patch in blocks.values()),
        "tokens": 1, "rate": 0.1, "tried": {}, "held_out_before": 1.0, "held_out_after": 0.5, "losses": [1.0],
    }  # fmt: skip


def planned(checkpoint: Any, names: Any, side: int = 16, scale: float = 0.05) -> dict[str, Blocks]:
    """The first and the last block of every weight, of random values."""
    blocks = {}
    for name in names:
        rows, cols = checkpoint.tensors[name].shape
        corners = {(0, 0), (-(-rows // side) - 1, -(-cols // side) - 1)}
        index = [torch.tensor(part, dtype=torch.int32) for part in zip(*sorted(corners), strict=True)]
        values = scale * torch.randn(len(corners), side, side, generator=torch.Generator().manual_seed(1))
        blocks[name] = Blocks(index[0], index[1], values.bfloat16())
    return blocks
