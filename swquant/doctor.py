"""What `swquant doctor` reports: versions, devices, memory, and what is missing with the command that installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from typing import Any

__all__ = ["examine"]

# package -> what it is for
_NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "numba": "searching scales (compress --refine)",
    "transformers": "model code and tokenizers",
    "safetensors": "reading by transformers",
    "compressed-tensors": "loading compressed checkpoints in stock transformers",
    "accelerate": "models larger than memory",
    "gguf": "GGUF files",
    "huggingface-hub": "hub ids",
    "matplotlib": "detect --plot",
    "psutil": "deciding whether a model fits in memory",
    "pydantic": "checking manifests",
    "typing-extensions": "checking manifests",
}
_OPTIONAL = {"vllm": "serving", "onnxruntime": "ONNX models", "onnxruntime-gpu": "ONNX models on CUDA"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _broken(package: str) -> str | None:
    """Why an installed package cannot be imported."""
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # a broken wheel raises anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _operators() -> dict[str, Any]:
    """Whether the operator library of ONNX Runtime is there and loads, and if not, what to do."""
    from exporters.ops import library_path
    from exporters.ops.build import find_compiler

    path = library_path()
    if path is None:
        compile_it = "python -m exporters.ops.build"
        remedy = compile_it if find_compiler() else f"install a C++ compiler (apt install g++), then {compile_it}"
        return {
            "library": None,
            "problem": "not compiled; models run through the function they carry",
            "remedy": remedy,
        }
    problem = None
    if _version("onnxruntime") or _version("onnxruntime-gpu"):
        try:
            onnxruntime = importlib.import_module("onnxruntime")
            onnxruntime.SessionOptions().register_custom_ops_library(str(path))
        except Exception as error:  # the runtime has a dozen exception classes of its own
            problem = str(error).partition(chr(10))[0]
    return {"library": str(path), "problem": problem, "remedy": problem and "python -m exporters.ops.build"}


def _provider() -> str | None:
    """What ONNX Runtime runs models on here; None where it or onnx is not installed."""
    try:
        from swquant.models.runtime import first_provider

        return first_provider()
    except Exception:  # not installed, or broken: `packages` and `operators` say so
        return None


def examine() -> dict[str, Any]:
    """{python, platform, swquant, packages, optional, operators, provider, devices, memory, missing}, as JSON can hold
    it."""
    packages = {name: _version(name) for name in _NEEDED}
    missing = [
        {"package": name, "for": _NEEDED[name], "problem": "not installed" if version is None else problem}
        for name, version in packages.items()
        if version is None or (problem := _broken(name))
    ]
    devices = []
    memory = None
    if not any(item["package"] == "torch" for item in missing):
        import torch

        devices = [f"cpu, {torch.get_num_threads()} threads"]
        devices += [f"cuda:{index}, {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    if not any(item["package"] == "psutil" for item in missing):
        import psutil

        memory = psutil.virtual_memory().available
    from swquant.version import __version__

    return {
        "swquant": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "optional": {name: _version(name) for name in _OPTIONAL},
        "operators": _operators(),
        "provider": _provider(),
        "devices": devices,
        "available_memory": memory,
        "missing": missing,
    }
