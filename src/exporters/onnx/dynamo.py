"""From a torch module to an ONNX graph with quantized linears: torch's dynamo exporter, and modules that emit our nodes.

`PackedLinear` takes the place of `nn.Linear` before the export. The exporter folds transposes and renames float weights, so
looking for MatMuls afterwards would be guesswork; a module that emits its node leaves clean names
(`model.layers.0.mlp.down_proj.codes`) and no float copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from exporters.onnx.function import OPSET
from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR, PackedWeight

__all__ = ["PackedLinear", "export_graph"]


class PackedLinear(nn.Module):
    """A linear layer of which only the ONNX node exists: it can be exported, not run (torch sees zeros)."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    deltas: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, accuracy_level: int) -> None:
        super().__init__()
        stock = weight.operator == "MatMulNBits"
        # MatMulNBits wants [N, blocks, bytes of a block].
        codes = weight.codes.view(weight.N, weight.scales.shape[1], -1) if stock else weight.codes
        self.register_buffer("codes", codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)
        self.register_buffer("rows", weight.rows)
        self.register_buffer("cols", weight.cols)
        self.register_buffer("deltas", weight.deltas)
        self.register_buffer("bias", bias)
        self._outputs = weight.N
        self._attributes: dict[str, Any]
        common = {"K": weight.K, "N": weight.N, "bits": weight.bits}
        if stock:
            self._operator = f"{MICROSOFT}::MatMulNBits"
            self._attributes = {**common, "block_size": weight.block, "accuracy_level": accuracy_level}
        else:
            self._operator = f"{DOMAIN}::{OPERATOR}"
            blocks = {"block_rows": 1, "block_cols": weight.block}
            self._attributes = {**common, **blocks, "accuracy_level": accuracy_level}

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        inputs = [x, self.codes, self.scales, self.zero_points, self.rows, self.cols, self.deltas]
        while inputs[-1] is None:
            inputs.pop()
        result = symbolic(
            self._operator, inputs, self._attributes, dtype=x.dtype, shape=(*x.shape[:-1], self._outputs), version=1
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


def export_graph(
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dimensions: Mapping[str, Sequence[str | int]],
) -> onnx_ir.Model:
    """The ONNX graph of `module`, whose PackedLinears become nodes.

    dynamic_shapes: as torch.export takes them. dimensions: input or output name -> the names of its dynamic dimensions and
    the sizes of the others, in place of the letters that the exporter invents.
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
    model.opset_imports[MICROSOFT] = 1
    model.opset_imports[DOMAIN] = 1
    return model
