"""ONNX Runtime as swquant uses it: is it there, the operator library, and sessions that report nothing but errors.

import swquant.ort, onnxruntime  # in this order: it switches the runtime's telemetry off

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

__all__ = ["first_provider", "library_path", "open_session", "require_exporter", "require_runtime"]

_INSTALL = 'pip install "swquant[cpu]"'
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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


def first_provider() -> str:
    """The provider that a session gets on this machine: onnxruntime also lists those that lack their device."""
    import onnxruntime
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    known = [name for name in reversed(_PROVIDERS.values()) if name in onnxruntime.get_available_providers()]
    return str(onnxruntime.InferenceSession(model.SerializeToString(), options, providers=known).get_providers()[0])


def open_session(
    path: Path,
    options: onnxruntime.SessionOptions | None = None,
    *,
    library: bool = True,
    device: str = "cpu",
) -> onnxruntime.InferenceSession:
    """A session with as many threads as torch uses. Raises SwquantError where it refuses file or device.

    library: whether to use the operator library, where it is installed. device: cpu or cuda.
    """
    require_runtime()
    import onnxruntime
    import torch

    if device not in _PROVIDERS:
        raise SwquantError(f"device {device!r} is not one of: {', '.join(_PROVIDERS)}")
    provider = _PROVIDERS[device]
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        if library and (operators := library_path()) is not None:
            options.register_custom_ops_library(str(operators))
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # the runtime has a dozen exception classes of its own
        raise SwquantError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({first_line(error)})"
        ) from None
    if session.get_providers()[0] != provider:  # the runtime falls back to the CPU and only logs why
        raise SwquantError(f"{path}: onnxruntime {onnxruntime.__version__} got no {provider} here; see swquant doctor")
    return session
