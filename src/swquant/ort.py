"""ONNX Runtime as swquant uses it: is it there, and sessions that report nothing but errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.errors import SwquantError, first_line

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["open_session", "require_exporter", "require_runtime"]

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
    path: Path, options: onnxruntime.SessionOptions | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session on the CPU. Raises SwquantError where the runtime refuses the file.

    threads: of one operator; as many as torch uses if None, so that a user sets one number.
    """
    require_runtime()
    import onnxruntime
    import torch

    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has a dozen exception classes of its own
        raise SwquantError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({first_line(error)})"
        ) from None
