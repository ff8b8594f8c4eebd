"""The plan: for every tensor of a checkpoint, how it will be stored or why it stays dense, before a byte is written.

`--dry-run` prints it, the writer follows it to the byte, the manifest records it. The safety rule lives here: a
loader that ignores the sidecar must still get a working model, so a super weight is either represented by its own
block (the extreme of a block is exact) or its tensor stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from calibrationless import Block, Channel, Group, SuperWeight, Tensor, columns
from exporters import compressed_tensors
from exporters.compressed_tensors import Scheme
from exporters.errors import SwquantError
from exporters.sidecar import patch_bytes
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.compress.choice import check_patterns, choose_block, dense_dtype, expert_block
from swquant.compress.options import CompressOptions
from swquant.detect.folds import Fold
from swquant.models.architecture import Architecture
from swquant.units import parse_bytes

__all__ = ["Plan", "TensorPlan", "make_plan"]

# Scaling channels makes the weights of a row less alike: within a block of a few hundred columns it pays, beyond it costs.
MAX_COLUMNS_TO_SCALE = 256


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor. block: None if it stays dense, then `reason` says why. bits: of a quantized one.

    layout: stored name -> (dtype, shape) of what is written for it. points: number of its weights in the sidecar.
    super_weights: (row, col) of those that the detection found in it. fold: the scaling that it takes part in, as a
    norm's gain or bias or as a weight that reads the norm.
    """

    name: str
    source: Stored
    layout: Layout
    block: Block | None = None
    bits: int = 0
    reason: str = ""
    points: int = 0
    super_weights: tuple[tuple[int, int], ...] = ()
    fold: Fold | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        return sum(Stored(dtype, shape).nbytes for dtype, shape in self.layout.values())

    @property
    def sidecar_bytes(self) -> int:
        return patch_bytes(self.points, self.source.dtype) if self.points else 0

    @property
    def shape(self) -> tuple[int, int]:
        return (self.source.shape[0], self.source.shape[1])


@dataclass(frozen=True)
class Plan:
    """tensors: in the order of the source. shards: the tensors of each file. left_out: name -> why it is not written.
    int8_inputs: whether stock loaders are told to round activations."""

    options: CompressOptions
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[TensorPlan, ...], ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    int8_inputs: bool = False

    @property
    def quantized(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.block is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and the sidecar, headers aside."""
        return sum(tensor.nbytes + tensor.sidecar_bytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight: codes, scales, zero points and outliers."""
        stored = sum(tensor.nbytes + tensor.sidecar_bytes for tensor in self.quantized)
        return 8 * stored / max(1, sum(tensor.source.numel for tensor in self.quantized))

    def scheme(self, tensor: TensorPlan) -> Scheme:
        """What the format declares for a quantized tensor."""
        assert tensor.block is not None
        carried = compressed_tensors.express(tensor.block, tensor.shape)
        group = carried.size if isinstance(carried, Group) else None
        return Scheme(tensor.bits, group, self.options.symmetric, self.int8_inputs)


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    super_weights: Sequence[SuperWeight],
    options: CompressOptions,
    folds: Sequence[Fold] = (),
    bits: Mapping[str, int] | None = None,
) -> Plan:
    """Decide for every tensor. bits: of tensors that are not to take those of the options. Raises SwquantError where an option
    fits nothing, or --strict-block fails."""
    found: dict[str, list[tuple[int, int]]] = {}
    for weight in super_weights:
        found.setdefault(weight.name, []).append((weight.row, weight.col))
    check_patterns(options.dense, checkpoint.tensors)
    left_out = _tied(checkpoint)
    block_of_experts = expert_block(checkpoint, architecture, found, options)
    int8_inputs = _int8_inputs(architecture, options)
    tensors: list[TensorPlan] = []
    fitted: dict[str, int] = {}
    for name, stored in checkpoint.tensors.items():
        if name in left_out:
            continue
        linear = architecture.weights.get(name)
        points = tuple(found.get(name, ()))
        is_expert = linear is not None and linear.kind == "expert"
        choice = block_of_experts if is_expert else choose_block(name, stored, linear, points, architecture, options)
        assert choice is not None
        if isinstance(choice, str):
            dtype = dense_dtype(checkpoint, stored, options)
            layout: Layout = {name: (dtype, stored.shape)}
            tensors.append(TensorPlan(name, stored, layout, reason=choice, super_weights=points))
            continue
        if choice != options.parsed_block:
            fitted[str(choice)] = fitted.get(str(choice), 0) + 1
        own_bits = (bits or {}).get(name, options.bits)
        tensors.append(_quantized(name, stored, choice, own_bits, points, checkpoint, options, int8_inputs))
    if not any(tensor.block for tensor in tensors):
        raise SwquantError(_nothing(checkpoint, tensors))
    tensors = _folded(tensors, folds)
    notes = [
        f"block {options.block_name} does not divide {count} tensors, which take {block}"
        for block, count in fitted.items()
    ]
    if options.activations == "int8" and block_of_experts is not None:
        notes.append("the inputs of experts stay in float; those of the other linear layers are rounded to int8")
    shards = _shards(tensors, parse_bytes(options.shard_size))
    return Plan(options, tuple(tensors), shards, left_out, tuple(notes), int8_inputs)


def _int8_inputs(architecture: Architecture, options: CompressOptions) -> bool:
    """Whether stock loaders can be told to round activations as we do, the kept channels aside: `int-quantized` knows rows
    of 8-bit codes and a scale for every token, and no experts. For all else they are told of the weights alone, which is
    safe: a float activation is closer to the original than a rounded one."""
    return (
        options.activations == "int8"
        and options.bits == 8
        and options.symmetric
        and options.per_token
        and isinstance(options.parsed_block, Channel | Tensor)
        and all(linear.kind != "expert" for linear in architecture.weights.values())
    )


def _folded(tensors: Sequence[TensorPlan], folds: Sequence[Fold]) -> list[TensorPlan]:
    """The tensors with the folds that pay: all that read the norm are rounded, in blocks of not too many columns."""
    plans = {tensor.name: tensor for tensor in tensors}
    for fold in folds:
        readers = [plans[name] for name in fold.readers]
        if all(tensor.block and columns(tensor.block, tensor.shape) <= MAX_COLUMNS_TO_SCALE for tensor in readers):
            for name in (*fold.readers, fold.gain, *filter(None, [fold.bias])):
                plans[name] = replace(plans[name], fold=fold)
    return list(plans.values())


def _nothing(checkpoint: Checkpoint, tensors: Iterable[TensorPlan]) -> str:
    """Why a plan without a quantized tensor cannot be what the user wants: the commonest reason, and the remedy."""
    reasons: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.source.shape) >= 2 and tensor.reason not in ("embedding", "lm_head", "router"):
            reasons[tensor.reason] = reasons.get(tensor.reason, 0) + 1
    if not reasons:
        return f"{checkpoint.name}: no linear weight in a decoder layer, nothing to compress"
    reason = max(reasons, key=reasons.__getitem__)
    return f"{checkpoint.name}: nothing would be compressed; {reasons[reason]} tensors: {reason}"


def _tied(checkpoint: Checkpoint) -> dict[str, str]:
    """The output embedding of a model that ties it to the input embedding: loaders ignore the stored copy."""
    tied = getattr(checkpoint.config.get_text_config(), "tie_word_embeddings", False)
    return {name: "tied to the embedding" for name in checkpoint.tensors if tied and name == "lm_head.weight"}


def _quantized(
    name: str,
    stored: Stored,
    block: Block,
    bits: int,
    points: tuple[tuple[int, int], ...],
    checkpoint: Checkpoint,
    options: CompressOptions,
    int8_inputs: bool,
) -> TensorPlan:
    shape = (stored.shape[0], stored.shape[1])
    local = compressed_tensors.tensor_layout(
        shape,
        block,
        bits,
        symmetric=options.symmetric,
        scale_dtype=dense_dtype(checkpoint, stored, options),
        int8_inputs=int8_inputs,
    )
    module = name.removesuffix(".weight")
    kept = (len(set(points)) + int(options.outlier_fraction * stored.numel)) if options.restore else 0
    return TensorPlan(
        name=name,
        source=stored,
        layout={f"{module}.{key}": form for key, form in local.items()},
        block=block,
        bits=bits,
        points=min(kept, stored.numel),
        super_weights=points,
    )


def _shards(tensors: Sequence[TensorPlan], limit: int) -> tuple[tuple[TensorPlan, ...], ...]:
    """Consecutive tensors, as many per file as the limit allows, at least one."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return tuple(tuple(shard) for shard in shards)
