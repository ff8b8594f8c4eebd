"""From a compressed checkpoint to the packed weights of an ONNX graph, and the torch model that they must agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from exporters.onnx.function import Form
from exporters.onnx.nodes import OPERATOR, PackedWeight, pack_weight
from swquant.architecture import describe
from swquant.checkpoint.compressed import CompressedCheckpoint

__all__ = ["PackedModel", "pack_model"]


@dataclass(frozen=True)
class PackedModel:
    """weights: module -> packed weight. form: of the file's LinearNBits nodes, None where there are none."""

    weights: dict[str, PackedWeight]
    form: Form | None


def pack_model(checkpoint: CompressedCheckpoint, model: PreTrainedModel, dtype: torch.dtype) -> PackedModel:
    """Pack every quantized weight of a checkpoint. Raises SwquantError for what no node can hold."""
    architecture = describe(checkpoint)
    weights: dict[str, PackedWeight] = {}
    for name in checkpoint.quantized_names:
        linear = architecture.weights.get(name)
        if linear is None or linear.kind != "linear" or not isinstance(model.get_submodule(linear.module), nn.Linear):
            raise SwquantError(
                f"{checkpoint.name}: {name} is an expert of a mixture, which ONNX export does not support; serve the "
                "checkpoint with transformers or vLLM"
            )
        try:
            weights[linear.module] = pack_weight(checkpoint.quantized(name), checkpoint.outliers(name), dtype)
        except ValueError as error:
            raise SwquantError(f"{checkpoint.name}: {name}: {error}; use --precision fp32") from None
    return _uniform(weights)


def _uniform(weights: dict[str, PackedWeight]) -> PackedModel:
    """One function gives all LinearNBits nodes of a file their meaning, so where one has outliers, all get some: an outlier
    of zero changes nothing."""
    ours = {name: weight for name, weight in weights.items() if weight.operator == OPERATOR}
    if not ours:
        return PackedModel(weights, None)
    form = Form(
        stock=all(weight.stock for weight in ours.values()),
        zero_points=any(weight.zero_points is not None for weight in ours.values()),
        outliers=any(weight.outliers for weight in ours.values()),
    )
    if form.outliers:
        place, nothing = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        bare = {name: weight for name, weight in ours.items() if not weight.outliers}
        weights |= {name: replace(weight, rows=place, cols=place, deltas=nothing) for name, weight in bare.items()}
    return PackedModel(weights, form)
