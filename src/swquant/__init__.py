"""swquant: compress large language models without calibration data.

    import swquant

    found = swquant.detect("model")                      # super weights, from one prompt
    result = swquant.compress("model", "model-w4-b128")  # 4-bit checkpoint, super weights kept
    model = swquant.load(result.path)                    # a transformers model, every outlier restored

Names are loaded when they are first used: `swquant --help` should not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.errors import SwquantError
    from swquant.api import compress, detect, evaluate, export, generate, inspect, load, study, verify
    from swquant.options import CompressOptions, StudyOptions

__version__ = "0.1.0"

_HOMES = {
    "compress": "swquant.api",
    "detect": "swquant.api",
    "evaluate": "swquant.api",
    "export": "swquant.api",
    "generate": "swquant.api",
    "inspect": "swquant.api",
    "load": "swquant.api",
    "study": "swquant.api",
    "verify": "swquant.api",
    "CompressOptions": "swquant.options",
    "StudyOptions": "swquant.options",
    "SwquantError": "exporters.errors",
}

__all__ = [
    "CompressOptions",
    "StudyOptions",
    "SwquantError",
    "__version__",
    "compress",
    "detect",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "study",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'swquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
