"""From a compressed checkpoint to the packed weights of an ONNX graph, and which inputs level 4 may not round.

Accuracy level 4 rounds activations to int8 in blocks along the inputs. One massive channel in a block takes all levels
for itself; the block's other activations vanish, which is the super weight's problem in the activations. So the
channels that tower over the others on the one prompt are multiplied apart, in float: those that the checkpoint names,
if its activations are int8, or those that the same rule finds here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import (
    Blocks,
    Group,
    Points,
    dequantize,
    fit,
    massive_channels,
    quantize,
    quantize_affine,
    shape_of,
)
from exporters.errors import SwquantError
from exporters.onnx.nodes import PackedWeight, pack_weight
from exporters.sidecar import SETS
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.architecture import LinearKind, describe
from swquant.models.rounded_inputs import kept_channels
from swquant.models.stock import table_modules

__all__ = [
    "at_level_4",
    "channels_of",
    "check_patches",
    "pack_head",
    "pack_weights",
    "packed_head",
    "unsupported",
    "watch_peaks",
]

_HEAD_BLOCK = 32


def unsupported(model: str, name: str) -> SwquantError:
    """The error about a weight that is no linear layer of its own."""
    return SwquantError(
        f"{model}: {name} is no linear layer of its own (an expert, a Conv1D), which ONNX export does not support; serve the "
        "checkpoint with transformers or vLLM"
    )


def check_patches(checkpoint: CompressedCheckpoint) -> None:
    """Raise SwquantError where a checkpoint has patches that no node can hold: without them it is another model."""
    for of_set in checkpoint.sets:
        if of_set not in SETS and any(patch.mode != "add" for patch in checkpoint.blocks(of_set).values()):
            raise SwquantError(
                f"{checkpoint.name}: ONNX export knows blocks that are added, those of its set {of_set} replace what they lie "
                "on; serve the checkpoint with swquant.load"
            )


def pack_weights(
    checkpoint: CompressedCheckpoint, model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, PackedWeight]:
    """Module -> packed weight, for every quantized weight of the decoder layers. Raises SwquantError for what no node
    can hold."""
    architecture = describe(checkpoint)
    weights: dict[str, PackedWeight] = {}
    for name in checkpoint.quantized_names:
        if name in (architecture.embedding, architecture.head):
            continue
        linear = architecture.weights.get(name)
        if (
            linear is None
            or linear.kind is not LinearKind.LINEAR
            or not isinstance(model.get_submodule(linear.module), nn.Linear)
        ):
            raise unsupported(checkpoint.name, name)
        try:
            quantized = checkpoint.quantized(name)
            patches = checkpoint.patches(name)
            points = next((patch for patch in patches if isinstance(patch, Points)), None)  # one set at most
            blocks = [patch for patch in patches if isinstance(patch, Blocks)]
            weights[linear.module] = pack_weight(quantized, points, dtype, blocks)
        except ValueError as error:
            raise SwquantError(f"{checkpoint.name}: {name}: {error}; use --precision fp32") from None
    return weights


def packed_head(
    checkpoint: CompressedCheckpoint, model: PreTrainedModel, dtype: torch.dtype
) -> tuple[str, PackedWeight, bool] | None:
    """What `pack_head` returns, of an output head that the checkpoint holds as codes; None of any other. A tied
    embedding becomes a table of its own, which the graph then finds."""
    architecture = describe(checkpoint)
    if architecture.head not in checkpoint.quantized_names:
        return None
    name, embedding = table_modules(model)[1], model.get_input_embeddings()
    tied = architecture.head == architecture.embedding
    if tied:
        embedding.weight = nn.Parameter(embedding.get_parameter("weight").detach().clone(), requires_grad=False)
    try:
        return name, pack_weight(checkpoint.quantized(architecture.head), None, dtype), tied
    except ValueError as error:
        raise SwquantError(f"{checkpoint.name}: {architecture.head}: {error}; use --precision fp32") from None


def pack_head(
    model: PreTrainedModel, bits: int, dtype: torch.dtype, *, compact: bool = False
) -> tuple[str, PackedWeight, bool]:
    """Round the output head to `bits` in blocks of 32; compact: with scales and offsets of a byte each, which all nodes
    of a file have or none. Returns its module's name, its packed weight, and whether the embedding is tied to it.

    The model's head becomes what the codes stand for, and so does a tied embedding: one table serves both.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = embedding.weight is head.weight
    name = next(name for name, module in model.named_modules() if module is head)
    weight = head.weight.detach()
    block = fit(Group(_HEAD_BLOCK), shape_of(weight))
    if block is None:
        raise SwquantError(f"{name}: {weight.shape[1]} inputs have no block of 16 or 32; leave --lm-head-bits out")
    if compact:
        quantized = quantize_affine(weight, block, bits, storage=None)
    else:
        quantized = quantize(weight, block, bits, scale_dtype=torch.float16)  # which a node stores in half its room
        quantized = replace(quantized, scale=quantized.scale.to(torch.float32))
    rounded = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None)
    rounded.weight = nn.Parameter(dequantize(quantized, torch.float32), requires_grad=False)
    if head.bias is not None:
        rounded.bias = head.bias
    model.set_submodule(name, rounded)
    if tied:
        embedding.weight = nn.Parameter(rounded.weight.detach().clone(), requires_grad=False)
    return name, pack_weight(quantized, None, dtype), tied


@contextmanager
def watch_peaks(model: PreTrainedModel, names: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Module -> largest |input| of every channel, [K], over all that runs inside the block."""
    peaks: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            peak = arguments[0].detach().abs().flatten(0, -2).amax(0).to("cpu", torch.float32)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return see

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]  # type: ignore[arg-type]
    try:
        yield peaks
    finally:
        for handle in hooks:
            handle.remove()


def channels_of(checkpoint: CompressedCheckpoint) -> dict[str, Tensor]:
    """Module -> int64 channels that the checkpoint keeps in float, [k]; only where it rounds inputs."""
    weights = describe(checkpoint).weights
    found = {name: kept_channels(name, record) for name, record in checkpoint.manifest["tensors"].items()}
    return {weights[name].module: channels for name, channels in found.items() if channels is not None}


def at_level_4(
    weights: Mapping[str, PackedWeight], peaks: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> dict[str, PackedWeight]:
    """The weights at accuracy level 4, with channels of their inputs multiplied apart: `known` ones, otherwise those
    that `peaks` show as massive."""
    massive = {name: known[name] if name in known else massive_channels(peaks[name]) for name in weights}
    kept = {name: channels.to(torch.int32) if len(channels) else None for name, channels in massive.items()}
    return {name: replace(weight, accuracy_level=4, channels=kept[name]) for name, weight in weights.items()}
