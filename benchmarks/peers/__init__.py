"""Every row of the quality benchmark, see `peers.base`."""

from __future__ import annotations

import sys
from pathlib import Path

# Packages that pin other versions than ours, or change transformers as soon as they are installed (SINQ), are kept in
# a folder of their own, which is looked through last. The Makefile fills it.
sys.path.append(str(Path(__file__).parents[2] / ".peers"))

from peers import autoround, calibrated, ggml, onnx_runtime, own, packages, sweep
from peers.base import CELLS, Cell, Method, Original, Outcome, missing, open_original, versions

__all__ = ["CELLS", "METHODS", "Cell", "Method", "Original", "Outcome", "missing", "open_original", "versions"]

METHODS: list[Method] = [
    *own.METHODS,
    *packages.METHODS,
    *autoround.METHODS,
    *onnx_runtime.METHODS,
    *ggml.METHODS,
    *calibrated.METHODS,
    *sweep.METHODS,
]
