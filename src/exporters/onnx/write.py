"""An ONNX model on disk: the graph in `model.onnx`, every weight in `model.onnx.data` beside it.

Protocol buffers end at 2 GB, so weights are always external. What follows the graph is dropped: shapes of inner values,
names of the source lines, anything that says on which machine it was made.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir

from exporters.onnx.function import Form, linear_function
from exporters.onnx.nodes import DOMAIN, OPERATOR

__all__ = ["DATA", "MODEL", "add_function", "count_operators", "save"]

MODEL, DATA = "model.onnx", "model.onnx.data"


def add_function(model: onnx_ir.Model, form: Form) -> None:
    """Put the meaning of swquant::LinearNBits into the file."""
    function = onnx_ir.serde.deserialize_function(linear_function(form))
    model.functions[function.identifier()] = function


def count_operators(model: onnx_ir.Model) -> dict[str, int]:
    """`domain::operator` (standard ones without a domain) -> nodes of it in the graph."""
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return dict(sorted(Counter(names).items()))


def save(model: onnx_ir.Model, folder: Path) -> None:
    """Write the model into `folder`, which exists."""
    used = {node.domain for node in model.graph}
    if not any(node.domain == DOMAIN and node.op_type == OPERATOR for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.producer_name, model.producer_version = "swquant", None
    model.doc_string = None
    for domain in set(model.opset_imports) - used - {""}:
        if not model.functions:
            model.opset_imports.pop(domain)
    onnx_ir.save(model, folder / MODEL, external_data=DATA)
    onnx.checker.check_model(folder / MODEL)
