"""From a torch module to an ONNX graph with quantized linears: torch's exporter, and modules that emit our nodes.

`Placeholder` takes the place of `nn.Linear` before the export. The exporter folds transposes and renames float weights,
so looking for MatMuls afterwards would be guesswork; a module that emits a node of its own name leaves no doubt and no
float copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from exporters.onnx.function import OPSET
from exporters.onnx.nodes import DOMAIN, PackedWeight
from exporters.onnx.place import Placer, common_form

__all__ = ["Placeholder", "export_graph"]

_PLACEHOLDER = "Placeholder"


class Placeholder(nn.Module):
    """A linear layer of which only a node exists, to be replaced by its packed weight; run, it gives zeros.

    name: by which `export_graph` finds the weight.
    """

    bias: Tensor | None

    def __init__(self, name: str, outputs: int, bias: Tensor | None) -> None:
        super().__init__()
        self._name, self._outputs = name, outputs
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        result = symbolic(
            f"{DOMAIN}::{_PLACEHOLDER}",
            [x],
            {"name": self._name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self._outputs),
            version=1,
        )
        return result if self.bias is None else result + self.bias


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that are not needed here (torchvision) and of names that it chooses."""
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _share_table(model: onnx_ir.Model, placer: Placer, name: str, table: Tensor, weight: PackedWeight) -> None:
    """The Gather of the rows of `table` reads the codes of the head `name`."""
    for node in [node for node in model.graph if node.op_type == "Gather"]:
        value = node.inputs[0]
        if value is None or value.const_value is None or tuple(value.const_value.shape) != tuple(table.shape):
            continue
        if np.array_equal(value.const_value.numpy(), table.numpy()):
            placer.replace_embedding(node, name, weight)
            if not value.uses():
                model.graph.initializers.pop(str(value.name))
            return
    raise ValueError("the embedding that shares the output head's codes is not used by the model")


def export_graph(
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimensions: Mapping[str, Sequence[str | int]],
    weights: Mapping[str, PackedWeight],
    tied: tuple[str, Tensor] | None = None,
) -> onnx_ir.Model:
    """The ONNX graph of `module`, whose Placeholders become the nodes of their weights.

    tied: (name in `weights`, table [N, K]) of an embedding that is to use the codes of an output head.
    dynamic_shapes: as torch.export takes them. dimensions: input or output name -> the names of its dynamic dimensions
    and the sizes of the others, in place of the letters that the exporter invents.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        )
    assert program is not None  # only the exporter of old returns None
    model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(dimensions[str(value.name)])
    placer = Placer(model)
    packed, form = common_form(weights)
    if form is not None:
        placer.add_function(form)
    unused = set(packed)
    for node in [node for node in model.graph if node.op_type == _PLACEHOLDER]:
        name = node.attributes["name"].as_string()
        placer.replace(node, name, packed[name])
        unused.discard(name)
    if tied is not None:
        _share_table(model, placer, *tied, packed[tied[0]])
    if unused:
        raise ValueError(f"{min(unused)} is not used by the model")
    return model
