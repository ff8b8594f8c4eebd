"""INT8 activations of a checkpoint: what its manifest says of every linear layer, and the modules that do it.

A tensor's record then has `inputs`: the channels that are kept in float, the most that each held on the prompt, the
median channel beside them, the norm that it reads (None: it reads no norm), and for a static range the scale. The
manifest's `activations` says how all of them are rounded. A module rounds its input and multiplies the result with its
dense weight: the same numbers, but for the order of sums, as an integer product with the kept channels added in float.

The channels do not depend on tokens, so a prompt without BOS, padding on the left, or a cache that is past the token of
the super activation change nothing: where a kept channel is small, keeping it does no harm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import round_activations
from exporters.errors import SwquantError
from swquant.checkpoints.manifest import rounded
from swquant.checkpoints.schema import CheckpointManifest, TensorRecord

if TYPE_CHECKING:
    from swquant.models.architecture import Architecture

__all__ = ["RoundedLinear", "kept_channels", "round_inputs"]


def kept_channels(name: str, record: TensorRecord) -> Tensor | None:
    """int64 [k] of a tensor's record, None where its inputs stay in float. Raises SwquantError for what is outside the
    weight: the manifest is a file."""
    if "dense" in record or "inputs" not in record:
        return None
    size, channels = record["shape"][1], record["inputs"]["channels"]
    if not all(0 <= channel < size for channel in channels):
        raise SwquantError(f"{name}: kept channels {channels} are not all in 0 to {size - 1}; the manifest is damaged")
    return torch.tensor(channels, dtype=torch.int64)


class RoundedLinear(nn.Linear):
    """A linear layer that rounds its input to int8, but for the channels that are kept.

    keep: bool [in]. scale: a static one, or None. The weight is shared with `linear`, which it replaces.
    """

    keep: Tensor

    def __init__(self, linear: nn.Linear, channels: Tensor, *, per_token: bool, scale: float | None = None) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device=torch.device("meta")
        )
        self.weight, self.bias = linear.weight, linear.bias
        keep = torch.zeros(linear.in_features, dtype=torch.bool)
        keep[channels] = True
        # Not persistent: save_pretrained writes the layer as the linear layer that stock loaders know.
        self.register_buffer("keep", keep.to(linear.weight.device), persistent=False)
        self.per_token, self.scale = per_token, scale
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        rounded = round_activations(input, self.keep, per_token=self.per_token, scale=self.scale)
        return super().forward(rounded)

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:.4g}"
        rounded = "per token" if self.per_token else "per tensor"
        return f"{super().extra_repr()}, int8 inputs {rounded}{scale}, {int(self.keep.sum())} channels kept"


def round_inputs(
    model: PreTrainedModel, manifest: CheckpointManifest, architecture: Architecture, *, restored: bool = True
) -> PreTrainedModel:
    """Let a model round its activations as the manifest says. Returns the model, its linear layers replaced.

    restored: False keeps no channel, and does nothing where stock loaders are not told to round: what they see. Raises
    SwquantError for a manifest that contradicts the model.
    """
    scheme = manifest["activations"]
    if scheme is None or not (restored or scheme["declared"]):
        return model
    for name, record in rounded(manifest["tensors"]).items():
        channels = kept_channels(name, record)
        if "inputs" not in record or channels is None:
            continue
        scale = record["inputs"].get("scale")
        if (scheme["range"] == "static") != (scale is not None) or not (
            scale is None or (math.isfinite(scale) and scale > 0)
        ):
            raise SwquantError(f"{name}: scale {scale} of its inputs is not one of range {scheme['range']}")
        if name not in architecture.weights:
            raise SwquantError(f"{name}: no linear weight of this model; the manifest is damaged")
        module = architecture.weights[name].module
        linear = model.get_submodule(module)
        if not isinstance(linear, nn.Linear):
            raise SwquantError(f"{name}: {type(linear).__name__} is not a linear layer; its inputs cannot be rounded")
        per_token = scheme["scale"] == "per-token"
        channels = channels if restored else channels[:0]
        model.set_submodule(module, RoundedLinear(linear, channels, per_token=per_token, scale=scale))
    return model
