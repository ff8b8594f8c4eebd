"""The ONNX Runtime operator `swquant::LinearNBits`: a linear layer on 2- to 8-bit weights, outliers restored.

    weights.cc    reads and checks the constants            library.cc   registers the operator
    cpu/          layout.cc, linear.cc and one file of inner loops per instruction set
    cuda/         kernels for few and for many rows          build.py     compiles all of it

The library is compiled when swquant is installed, if there is a C++ compiler; without it exported models still run,
through the function of the same name that every file carries. What is computed, how, and how fast: docs/operator.md.

    options = onnxruntime.SessionOptions()
    if path := library_path():
        options.register_custom_ops_library(str(path))
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DOMAIN", "LIBRARY", "OPERATOR", "library_path"]

DOMAIN, OPERATOR = "swquant", "LinearNBits"
LIBRARY = "libswquant_ops.so"


def library_path() -> Path | None:
    """The compiled operator library, or None where the package was installed without a compiler."""
    path = Path(__file__).parent / LIBRARY
    return path if path.is_file() else None
