"""ONNX Runtime as swquant uses it: is it there, the operator library, and sessions that report nothing but errors.

import onnxruntime, swquant.ort

options = onnxruntime.SessionOptions()
if library := swquant.ort.library_path():  # without it, the file's own function is used
    options.register_custom_ops_library(str(library))
session = onnxruntime.InferenceSession("folder/model.onnx", options)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.errors import SwquantError, first_line
from exporters.ops import library_path

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["library_path", "open_session", "require_exporter", "require_runtime"]

_INSTALL = 'pip install "swquant[cpu]"'


def require_runtime() -> None:
    """Raise SwquantError unless onnxruntime can be imported."""
    try:
        import onnxruntime  # noqa: F401
    except Exception as error:  # a broken wheel raises anything
        raise SwquantError(f"ONNX needs onnxruntime ({first_line(error)}): {_INSTALL}") from None


def require_exporter() -> None:
    """Raise SwquantError unless everything that writes ONNX models is installed."""
    missing = [name for name in ("onnx", "onnx_ir", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SwquantError(f"ONNX export needs {', '.join(missing)}: {_INSTALL}")
    require_runtime()


def open_session(
    path: Path, options: onnxruntime.SessionOptions | None = None, *, library: bool = True
) -> onnxruntime.InferenceSession:
    """A session on the CPU with as many threads as torch uses. Raises SwquantError where the runtime refuses the file.

    library: whether to use the operator library, where it is installed.
    """
    require_runtime()
    import onnxruntime
    import torch

    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        if library and (operators := library_path()) is not None:
            options.register_custom_ops_library(str(operators))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen exception classes of its own
        raise SwquantError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({first_line(error)})"
        ) from None
