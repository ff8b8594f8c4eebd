"""The plan: for every tensor of a checkpoint, how it will be stored or why it stays dense, before a byte is written.

`--dry-run` prints it, the writer follows it to the byte, the manifest records it. The safety rule lives here: a
loader that ignores the sidecar must still get a working model, so a super weight is either represented by its own
block (the extreme of a block is exact) or its tensor stays dense.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from calibrationless import Block, Channel, Flat, Group, SuperWeight, Tensor, Tile, block_elements, columns, fit
from exporters import compressed_tensors
from exporters.compressed_tensors import Scheme
from exporters.errors import SwquantError
from exporters.sidecar import patch_bytes
from swquant.architecture import Architecture, LinearWeight
from swquant.checkpoint.base import Checkpoint, Stored
from swquant.folding import Fold
from swquant.options import CompressOptions, parse_bytes

__all__ = ["Plan", "TensorPlan", "make_plan"]

# Weights in a block that may hold a super weight, at 4 bits: beyond a few hundred, the step that represents it rounds all its
# neighbours to zero. Each further bit halves the step and doubles the limit.
MAX_BLOCK_WITH_SUPER_WEIGHT = 512
# Scaling channels makes the weights of a row less alike: within a block of a few hundred columns it pays, beyond it costs.
MAX_COLUMNS_TO_SCALE = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
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
    _check_patterns(options.dense, checkpoint.tensors)
    left_out = _tied(checkpoint)
    expert_block = _expert_block(checkpoint, architecture, found, options)
    int8_inputs = _int8_inputs(architecture, options)
    tensors: list[TensorPlan] = []
    fitted: dict[str, int] = {}
    for name, stored in checkpoint.tensors.items():
        if name in left_out:
            continue
        linear = architecture.weights.get(name)
        points = tuple(found.get(name, ()))
        is_expert = linear is not None and linear.kind == "expert"
        choice = expert_block if is_expert else _choose(name, stored, linear, points, architecture, options)
        assert choice is not None
        if isinstance(choice, str):
            dtype = _dense_dtype(checkpoint, stored, options)
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
    if options.activations == "int8" and expert_block is not None:
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


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def _check_patterns(patterns: Sequence[str], names: Iterable[str]) -> None:
    known = tuple(names)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in known):
            raise SwquantError(f"--dense {pattern!r} matches no tensor; names look like {known[len(known) // 2]}")


def _dense_dtype(checkpoint: Checkpoint, stored: Stored, options: CompressOptions) -> torch.dtype:
    """What a tensor's unrounded values, or its scales, are stored as. GGUF values are decoded to float32, which nobody
    wants on disk; others keep their dtype unless an option says otherwise."""
    if stored.dtype not in _FLOATS:
        return stored.dtype
    return options.parsed_dtype or (torch.bfloat16 if checkpoint.kind == "gguf" else stored.dtype)


def _choose(
    name: str,
    stored: Stored,
    linear: LinearWeight | None,
    points: Sequence[tuple[int, int]],
    architecture: Architecture,
    options: CompressOptions,
) -> Block | str:
    """The block of a tensor, or why it stays dense."""
    if linear is None:
        return architecture.dense.get(name, "unknown")
    if pattern := next((pattern for pattern in options.dense if _matches(pattern, name)), None):
        return f"--dense {pattern}"
    if stored.dtype not in _FLOATS:
        return f"stored as {str(stored.dtype).removeprefix('torch.')}"
    if linear.kind == "conv1d":
        return "Conv1D, which compressed-tensors cannot pack (it knows nn.Linear)"
    if linear.kind == "custom":
        return "a linear layer with a forward of its own, which stock loaders cannot decode"
    if linear.kind == "fused":
        return "experts fused in one 3-D tensor: compressed-tensors has no name for a slice"
    shape = (stored.shape[0], stored.shape[1])
    block = fit(options.parsed_block, shape)
    if block is None or (options.strict_block and block != options.parsed_block):
        problem = f"block {options.block_name} does not divide {_dimension(options.parsed_block, shape)} of {name}"
        if options.strict_block:
            raise SwquantError(f"{problem}; use {_remedy(options.parsed_block, shape)}")
        return f"{problem} and no power of two from 16 does"
    if compressed_tensors.express(block, shape) is None:
        raise SwquantError(
            f"block {block} straddles the rows of {name} {list(shape)}, which compressed-tensors cannot store; "
            f"use {_remedy(Group(128), shape)}, or a flat block that is a multiple of {shape[1]}"
        )
    if points and block_elements(block, shape) > _limit(options):
        return (
            f"holds a super weight, which a block of {block_elements(block, shape)} weights cannot represent for loaders "
            f"that ignore the sidecar (limit {_limit(options)})"
        )
    return block


def _limit(options: CompressOptions) -> int:
    return MAX_BLOCK_WITH_SUPER_WEIGHT << max(0, options.bits - 4)


_EXPERTS = "transformers loads a mixture only if all its experts are packed with one symmetric scheme"


def _expert_block(
    checkpoint: Checkpoint,
    architecture: Architecture,
    found: Mapping[str, Sequence[tuple[int, int]]],
    options: CompressOptions,
) -> Block | None:
    """The one block that all experts share, None where there are no experts. Raises SwquantError where there cannot be one:
    a checkpoint whose experts are partly dense does not load."""
    names = [name for name, linear in architecture.weights.items() if linear.kind == "expert"]
    if not names:
        return None
    if not options.symmetric:
        raise SwquantError(f"{_EXPERTS}; use --symmetric")
    for pattern in options.dense:
        if matched := next((name for name in names if _matches(pattern, name)), None):
            raise SwquantError(f"--dense {pattern} matches {matched}, but {_EXPERTS}; give a narrower pattern")
    if odd := next((name for name in names if checkpoint.tensors[name].dtype not in _FLOATS), None):
        raise SwquantError(
            f"{odd} is stored as {checkpoint.tensors[odd].dtype}, but {_EXPERTS}; convert it to bfloat16"
        )
    shapes = [(checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in names]
    common = (math.gcd(*(out for out, _ in shapes)), math.gcd(*(inputs for _, inputs in shapes)))
    block = fit(options.parsed_block, common)
    carried = {compressed_tensors.express(block, shape) for shape in shapes} if block else {None}
    if block is None or len(carried) > 1 or None in carried:
        raise SwquantError(
            f"block {options.block_name} cannot be the same for experts of {common[1]} common inputs, but {_EXPERTS}; "
            f"use {_remedy(options.parsed_block, common)}"
        )
    if options.strict_block and block != options.parsed_block:
        raise SwquantError(
            f"block {options.block_name} does not divide {names[0]}; use {_remedy(options.parsed_block, common)}"
        )
    for name, shape in zip(names, shapes, strict=True):
        if found.get(name) and block_elements(block, shape) > _limit(options):
            raise SwquantError(
                f"{name} holds a super weight, which a block of {block_elements(block, shape)} weights cannot represent, but "
                f"{_EXPERTS}; use a block of at most {_limit(options)} weights, for example --block 128"
            )
    return block


def _dimension(block: Block, shape: tuple[int, int]) -> str:
    match block:
        case Flat():
            return f"the {shape[0] * shape[1]} weights"
        case Tile():
            return f"shape {list(shape)}"
        case _:
            return f"in_features {shape[1]}"


def _remedy(block: Block, shape: tuple[int, int]) -> str:
    """Sizes near the one asked for that do divide the inputs, and `channel`."""
    size = block.cols if isinstance(block, Tile) else getattr(block, "size", 128)
    divisors = [number for number in range(16, shape[1] + 1) if shape[1] % number == 0]
    below = [number for number in divisors if number <= size][-1:]
    above = [number for number in divisors if number > size][:1]
    return ", ".join(map(str, below + above)) + (" or channel" if below + above else "channel")


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
        scale_dtype=_dense_dtype(checkpoint, stored, options),
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
