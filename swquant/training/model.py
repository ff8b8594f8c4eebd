"""A model that trains blocks: its layers replaced by patched ones, everything else frozen.

    running = trainable_model(checkpoint)            the dense model in float32, nothing trainable yet
    layers = lay(running, checkpoint, blocks)        stored name -> PatchedLinear, in place

`linear_names` says which stored weights can be patched. Experts of a mixture and layers with a forward of their own are
not among them: their products are not those of one linear layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import Blocks
from exporters.errors import SwquantError
from exporters.sidecar import OUTLIERS
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.architecture import Architecture, LinearKind, LinearWeight, describe
from swquant.models.devices import place_for
from swquant.models.loading import build_model
from swquant.parallel import world
from swquant.training.data import Batch
from swquant.training.patched_linear import DenseWeight, Frozen, PackedWeight, PatchedLinear
from swquant.training.scales import ScaledWeight

__all__ = ["lay", "linear_names", "load_trainable", "logits_of", "place_of", "trainable_model", "trained_parameters"]


def place_of(checkpoint: Checkpoint, device: torch.device) -> tuple[torch.device, str]:
    """Where a model trains that is to train on a device, and what to say of it: there if it fits, in every process of
    those that train together, else on the CPU."""
    place, said = place_for(checkpoint, torch.float32, device)
    (fitting,) = world().totals(place.type == device.type)
    if 0 < fitting < world().size:
        return torch.device("cpu"), f" on the CPU: {device.type} has room for {fitting:.0f} of {world().size} processes"
    return place, said


def trainable_model(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model in float32, patches laid, without a trainable parameter. Raises SwquantError where its inputs are
    rounded: rounding has no gradient."""
    if isinstance(checkpoint, CompressedCheckpoint) and checkpoint.manifest["activations"]:
        raise SwquantError(
            f"{checkpoint.name}: its activations are rounded to int8, which has no gradient; tune one with weights "
            "rounded only, or the original"
        )
    model = build_model(checkpoint, torch.float32, device)
    model.requires_grad_(False)
    return model.eval()


def linear_names(architecture: Architecture, model: PreTrainedModel) -> dict[str, LinearWeight]:
    """Stored name -> linear weight that can be patched."""
    kinds = (LinearKind.LINEAR, LinearKind.CONV1D)
    return {
        name: weight
        for name, weight in architecture.weights.items()
        if weight.kind in kinds and weight.parameter == "weight" and _shared(model, weight) == 1
    }


def _shared(model: PreTrainedModel, weight: LinearWeight) -> int:
    """How many modules use a weight: one that is shared would be patched in one place only."""
    held = getattr(model.get_submodule(weight.module), weight.parameter, None)
    return sum(parameter is held for parameter in model.parameters())


def lay(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    weights: Mapping[str, LinearWeight],
    blocks: Mapping[str, Blocks],
    *,
    packed: bool = True,
    over: str | None = None,
    scales: Collection[str] = (),
) -> dict[str, PatchedLinear]:
    """Replace the layers that have blocks. weights: from `linear_names`; blocks: stored name -> blocks that are added.
    over: the set of the checkpoint that they are, which then is no part of the weight under them. scales: stored names
    of rounded weights whose scales are trained, with blocks or without.

    packed: keep the codes of a compressed weight packed and decode them when they are needed, which takes a fifth of
    the memory and, on the CPU, a little time; False keeps the dense weight, where the model is.
    Returns stored name -> layer.
    """
    layers = {}
    for name in (name for name in checkpoint.tensors if name in blocks or name in scales):
        weight = weights[name]
        module: Any = model.get_submodule(weight.module)
        frozen: Frozen | None = None
        if name in scales:
            assert isinstance(checkpoint, CompressedCheckpoint)
            scaled = ScaledWeight(checkpoint.quantized(name), checkpoint.patches(name, over), weight.transposed)
            frozen = scaled.on(module.weight.device)
        elif packed:
            frozen = _packed(checkpoint, name, weight.transposed, over)
        if frozen is None:
            dense: Tensor = module.weight.detach()
            if over is not None and isinstance(checkpoint, CompressedCheckpoint):
                dense = checkpoint.read_without(name, over).to(dense)
            frozen = DenseWeight(dense.T.contiguous() if weight.transposed else dense)
        layer = PatchedLinear(frozen, module.bias, blocks.get(name), transposed=weight.transposed)
        parent, _, leaf = weight.module.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to(module.weight.device))
        layers[name] = layer
    return layers


def trained_parameters(layers: Mapping[str, PatchedLinear]) -> dict[str, nn.Parameter]:
    """What is trained, by names that stay the same from run to run: for blocks those of the tensors, for scales and
    offsets with /steps and /shifts behind them."""
    found = {}
    for name, layer in layers.items():
        if layer.values.requires_grad:
            found[name] = layer.values
        if isinstance(layer.frozen, ScaledWeight):
            found |= {f"{name}/{local}": parameter for local, parameter in layer.frozen.named_parameters()}
    return found


def load_trainable(checkpoint: Checkpoint, device: str = "cpu") -> PreTrainedModel:
    """The model with the blocks of its last set as its only trainable parameters, its weights frozen and packed. Raises
    SwquantError where it has none that are added."""
    sets = checkpoint.sets if isinstance(checkpoint, CompressedCheckpoint) else ()
    if not isinstance(checkpoint, CompressedCheckpoint) or sets[-1:] in ((), (OUTLIERS,)):
        raise SwquantError(f"{checkpoint.name}: has no blocks to train; swquant tune makes them")
    blocks = checkpoint.blocks(sets[-1])
    model = trainable_model(checkpoint, device)
    weights = linear_names(describe(checkpoint), model)
    if odd := next((name for name, patch in blocks.items() if patch.mode != "add" or name not in weights), None):
        raise SwquantError(f"{checkpoint.name}: the blocks of {odd} cannot be trained, they replace what they lie on")
    lay(model, checkpoint, weights, blocks, over=sets[-1])
    return model


def _packed(checkpoint: Checkpoint, name: str, transposed: bool, over: str | None) -> PackedWeight | None:
    """A weight of a compressed checkpoint as its file holds it; None where it is stored dense."""
    if not isinstance(checkpoint, CompressedCheckpoint) or name not in checkpoint.quantized_names:
        return None
    parts, bits, (rows, cols) = checkpoint.packed(name)
    return PackedWeight(parts, bits, (rows, cols), checkpoint.patches(name, over), transposed)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """[sequences, length - 1, vocabulary]: what is predicted for the tokens 1, 2, … of a batch on the model's
    device."""
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits[:, :-1]
