"""swquant: compress large language models without calibration data.

    import swquant

    found = swquant.detect("model")                      # super weights, from one prompt
    result = swquant.compress("model", "model-w4-b128")  # 4-bit checkpoint, super weights kept
    model = swquant.load(result.path)                    # a transformers model, every outlier restored

Names are loaded when they are first used: `swquant --help` should not wait for torch. A verb is a function here and a
folder beside this file; the function has the name.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from swquant.version import __version__

if TYPE_CHECKING:
    from exporters.errors import SwquantError
    from swquant.adapt.options import AdaptOptions
    from swquant.api import compress, detect, evaluate, export, inspect, load, plan, study, verify
    from swquant.compress.options import CompressOptions
    from swquant.derive import adapt, distill, export_set, generate, merge, moe, push, tune
    from swquant.distill.options import DistillOptions
    from swquant.export.gguf.options import GgufOptions
    from swquant.export.onnx.options import ExportOptions
    from swquant.merge.options import MergeOptions
    from swquant.moe.options import MoeOptions
    from swquant.study.options import StudyOptions
    from swquant.tune.options import TuneOptions

# onnxruntime looks up a host for its telemetry when it is imported, so this has to stand before, and for sub-processes,
# too. Who wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "adapt": "swquant.derive",
    "compress": "swquant.api",
    "detect": "swquant.api",
    "distill": "swquant.derive",
    "evaluate": "swquant.api",
    "export": "swquant.api",
    "export_set": "swquant.derive",
    "generate": "swquant.derive",
    "inspect": "swquant.api",
    "load": "swquant.api",
    "merge": "swquant.derive",
    "moe": "swquant.derive",
    "plan": "swquant.api",
    "push": "swquant.derive",
    "study": "swquant.api",
    "tune": "swquant.derive",
    "verify": "swquant.api",
    "AdaptOptions": "swquant.adapt.options",
    "CompressOptions": "swquant.compress.options",
    "DistillOptions": "swquant.distill.options",
    "ExportOptions": "swquant.export.onnx.options",
    "GgufOptions": "swquant.export.gguf.options",
    "MergeOptions": "swquant.merge.options",
    "MoeOptions": "swquant.moe.options",
    "StudyOptions": "swquant.study.options",
    "TuneOptions": "swquant.tune.options",
    "SwquantError": "exporters.errors",
}

__all__ = [
    "AdaptOptions",
    "CompressOptions",
    "DistillOptions",
    "ExportOptions",
    "GgufOptions",
    "MergeOptions",
    "MoeOptions",
    "StudyOptions",
    "SwquantError",
    "TuneOptions",
    "__version__",
    "adapt",
    "compress",
    "detect",
    "distill",
    "evaluate",
    "export",
    "export_set",
    "generate",
    "inspect",
    "load",
    "merge",
    "moe",
    "plan",
    "push",
    "study",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'swquant' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Face(ModuleType):
    """Whoever imports `swquant.detect.found` first makes Python bind the folder `detect` to this module's name: it must
    stay the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
