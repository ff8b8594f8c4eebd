"""An ONNX model on disk: the graph in `model.onnx`, every weight in `model.onnx.data` beside it.

Protocol buffers end at 2 GB, so weights are always external. Names of source lines and of the machine are dropped.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir

from exporters.onnx.files import DATA, MODEL

__all__ = ["count_operators", "save", "weight_bytes"]


def count_operators(model: onnx_ir.Model) -> dict[str, int]:
    """`domain::operator` (standard ones without a domain) -> nodes of it in the graph."""
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)
    return dict(sorted(Counter(names).items()))


def weight_bytes(model: onnx_ir.Model) -> int:
    """Bytes of all weights."""
    contents = (value.const_value for value in model.graph.initializers.values())
    return sum(content.nbytes for content in contents if content is not None)


def save(model: onnx_ir.Model, folder: Path) -> None:
    """Write the model into `folder`, which exists."""
    used = {node.domain for function in model.functions.values() for node in function}
    used |= {node.domain for node in model.graph} | {""}
    for domain in set(model.opset_imports) - used:
        model.opset_imports.pop(domain)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    model.producer_name, model.producer_version = "swquant", None
    model.doc_string = None
    onnx_ir.save(model, folder / MODEL, external_data=DATA)
