"""mlx-lm, run by the Python of its environment. See `deployments.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from timing import report

asked = json.load(sys.stdin)
model, _ = load(asked["file"])
with Path(asked["out"]).open("wb") as file:
    for window in asked["windows"]:
        file.write(np.array(model(mx.array([window]))[0].astype(mx.float32)).tobytes())


def written(count: int) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(asked["prompt"]), model, max_tokens=count)]


report(written, asked["tokens"])
