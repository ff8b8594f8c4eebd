"""The plan: for every tensor of a checkpoint, how it will be stored or why it stays dense, before a byte is written.

`--dry-run` prints it, the writer follows it to the byte, the manifest records it. A tensor's plan is complete: with its
weight and what is known of its inputs, `tensor.round_tensor` needs nothing else. `choice` picks the block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from calibrationless import Block, Channel, Group, Recipe, SuperWeight, Whole, columns
from exporters import layouts
from exporters.affine_layout import GROUPS
from exporters.compressed_tensors import Scheme
from exporters.errors import SwquantError
from exporters.sidecar import OUTLIERS, PlannedPatch
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.compress.choice import (
    Decoded,
    bits_of,
    check_patterns,
    choose_block,
    dense_dtype,
    expert_block,
    shared_block,
    table_block,
)
from swquant.compress.options import CompressOptions
from swquant.compress.tables import Table, tied_copies
from swquant.detect.folds import Fold
from swquant.models.architecture import Architecture, Dense, LinearKind
from swquant.pr_moe import PrMoeConfig
from swquant.units import parse_bytes

__all__ = ["Plan", "SchemesError", "TensorPlan", "TooFewCodesError", "make_plan"]

# Scaling channels makes the weights of a row less alike: in a block of a few hundred columns it pays, beyond it costs.
MAX_COLUMNS_TO_SCALE = 256


class TooFewCodesError(SwquantError):
    """What is asked for makes sense, but too few of the weights could be packed so."""


class SchemesError(SwquantError):
    """Weights that would have to share one scheme have two. of_tables: whether only an embedding or output head differs
    from the linear weights."""

    def __init__(self, message: str, schemes: Sequence[Scheme], *, of_tables: bool) -> None:
        super().__init__(message)
        self.schemes, self.of_tables = schemes, of_tables


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor. recipe: how it is rounded, None if it stays dense, then `reason` says why.

    layout: stored name -> (dtype, shape) of what is written for it. patches: what the sidecar will hold of it.
    super_weights: (row, col) of those that the detection found in it. fold: the scaling that it takes part in, as a
    norm's gain or bias or as a weight that reads the norm. int8_inputs: whether it is stored for integer products.
    transposed: stored [in, out] (Conv1D), so that its blocks run along the outputs of one input. stored_as: the type of
    its blocks, where the format has names for them (GGUF). table: what a rounded embedding or output head is to the
    model (`tables.Table.role`), "" for all else.
    """

    name: str
    source: Stored
    layout: Layout
    recipe: Recipe | None = None
    reason: str = ""
    patches: tuple[PlannedPatch, ...] = ()
    super_weights: tuple[tuple[int, int], ...] = ()
    fold: Fold | None = None
    int8_inputs: bool = False
    transposed: bool = False
    stored_as: str = ""
    table: str = ""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def block(self) -> Block | None:
        return self.recipe.block if self.recipe is not None else None

    @property
    def bits(self) -> int:
        """Of a quantized tensor; 0 of a dense one."""
        return self.recipe.bits if self.recipe is not None else 0

    @property
    def outliers(self) -> int:
        """Number of its weights in the sidecar."""
        return self.recipe.outliers if self.recipe is not None else 0

    @property
    def nbytes(self) -> int:
        return sum(Stored(dtype, shape).nbytes for dtype, shape in self.layout.values())

    @property
    def sidecar_bytes(self) -> int:
        return sum(patch.nbytes for patch in self.patches)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.source.shape[0], self.source.shape[1])


@dataclass(frozen=True)
class Plan:
    """tensors: in the order of the source; with --refine self, what lies in decoder layers in their order. shards:
    the tensors of each file. left_out: name -> why it is not written. int8_inputs: whether stock loaders are told to
    round activations. decoded: why stock transformers is told to decode all weights while it loads them, if it
    is; all weights then share one scheme. mixture: whether the architecture is one that only swquant knows. unread: why
    stock transformers refuses to load it, "" where it does not."""

    options: CompressOptions
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[TensorPlan, ...], ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    int8_inputs: bool = False
    decoded: Decoded = Decoded.NOTHING
    mixture: bool = False
    unread: str = ""

    @property
    def quantized(self) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.block is not None)

    @property
    def linear(self) -> tuple[TensorPlan, ...]:
        """Those of `quantized` that are linear weights of decoder layers."""
        return tuple(tensor for tensor in self.quantized if not tensor.table)

    @property
    def tables(self) -> tuple[TensorPlan, ...]:
        """The others: the embedding and the output head."""
        return tuple(tensor for tensor in self.quantized if tensor.table)

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
        carried = self.options.layout.express(tensor.block, tensor.shape)
        group = carried.size if isinstance(carried, Group) else None
        offset = self.options.offset_kind != "none"
        return Scheme(tensor.bits, group, self.options.symmetric, tensor.int8_inputs, offset)


def make_plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    super_weights: Sequence[SuperWeight],
    options: CompressOptions,
    folds: Sequence[Fold] = (),
    bits: Mapping[str, int] | None = None,
    left_out: Mapping[str, str] | None = None,
    tables: Mapping[str, Table] | None = None,
    *,
    decoded: Decoded = Decoded.NOTHING,
) -> Plan:
    """Decide for every tensor. bits: of tensors that are not to take those of the options. left_out: from
    `tied_copies`. tables: from `tables_of`. decoded: see `Plan`. Raises SwquantError where an option fits nothing, or
    --strict-block fails."""
    coordinates = _coordinates(architecture, super_weights)
    check_patterns(options, checkpoint.tensors)
    if left_out is None:
        left_out = tied_copies(checkpoint, architecture)
    tables = tables or {}
    asked = _with_one_block(checkpoint, (*architecture.weights, *tables), options) if decoded else options
    of_experts = expert_block(checkpoint, architecture, coordinates, asked)
    int8_inputs = not decoded and _int8_inputs(architecture, options)
    tensors: list[TensorPlan] = []
    for name in _order(checkpoint, architecture, options):
        if name in left_out:
            continue
        stored = checkpoint.tensors[name]
        linear = architecture.weights.get(name)
        own = tuple(coordinates.get(name, ()))
        table = tables.get(name)
        choice: Block | Dense | None = of_experts
        if table is not None:
            choice = table_block(name, stored, table, asked, decoded=decoded)
        elif linear is None or linear.kind is not LinearKind.EXPERT:
            choice = choose_block(name, stored, linear, own, architecture, asked, decoded=decoded)
        assert choice is not None
        dtype = dense_dtype(checkpoint, stored, options)
        if isinstance(choice, Dense):
            layout: Layout = {name: (dtype, stored.shape)}
            tensors.append(TensorPlan(name, stored, layout, reason=choice.reason, super_weights=own))
            continue
        number = (bits or {}).get(name, bits_of(name, options)) if table is None else table.bits
        outliers = _outliers(stored.numel, own, options) if table is None else 0
        recipe = _recipe(choice, number, dtype, own, outliers, options)
        transposed = linear is not None and linear.transposed
        made = _quantized(name, stored, recipe, int8_inputs and table is None, transposed=transposed)
        tensors.append(made if table is None else replace(made, table=table.role))
    if not any(tensor.block and not tensor.table for tensor in tensors):
        raise TooFewCodesError(_nothing(checkpoint, tensors))
    tensors = _folded(tensors, folds)
    shards = _shards(tensors, parse_bytes(options.shard_size))
    notes = (*_notes(tensors, of_experts, options, decoded=decoded), *checkpoint.notes)
    mixture = isinstance(checkpoint.config, PrMoeConfig)
    plan = Plan(options, tuple(tensors), shards, left_out, notes, int8_inputs, decoded, mixture)
    if decoded:
        _check_one_scheme(checkpoint, plan)
    return plan


def _recipe(
    block: Block,
    bits: int,
    scale_dtype: torch.dtype,
    super_weights: tuple[tuple[int, int], ...],
    outliers: int,
    options: CompressOptions,
) -> Recipe:
    """How one tensor is rounded: what is its own, and what the options say of all."""
    return Recipe(
        block=block,
        bits=bits,
        symmetric=options.symmetric,
        offsets=options.offset_kind,
        clip=options.parsed_clip,
        scale_dtype=scale_dtype,
        super_weights=super_weights,
        outliers=outliers,
    )


def _order(checkpoint: Checkpoint, architecture: Architecture, options: CompressOptions) -> list[str]:
    """The order in which tensors are rounded and written. The model's own text goes through it layer by layer, so the
    layers follow each other; many files have the tenth behind the first."""
    names = list(checkpoint.tensors)
    if options.refinement != "self":
        return names
    layers = {name: layer for name in names if (layer := architecture.layer_of(name)) is not None}
    in_turn = iter(sorted(layers, key=layers.__getitem__))
    return [next(in_turn) if name in layers else name for name in names]


def _with_one_block(checkpoint: Checkpoint, names: Iterable[str], options: CompressOptions) -> CompressOptions:
    """The options with the block that all these weights share."""
    asked = replace(options, block=str(shared_block(checkpoint, names, options)))
    if options.offset_kind == "float" and asked.parsed_block not in GROUPS:
        raise SwquantError(
            f"{checkpoint.name}: block {asked.block_name} holds no offsets: their layout takes 32, 64 or 128 inputs"
        )
    return asked


def _check_one_scheme(checkpoint: Checkpoint, plan: Plan) -> None:
    schemes = list(dict.fromkeys(plan.scheme(tensor) for tensor in plan.quantized))
    if len(schemes) > 1:
        alike = "one number of bits" if schemes[0].bits != schemes[1].bits else "--block 32 or channel"
        other = {Decoded.ZERO_POINTS: ", or --symmetric"}.get(plan.decoded, "")
        other = ", or --offsets none" if plan.options.offset_kind == "float" else other
        raise SchemesError(
            f"{checkpoint.name}: stock transformers holds no {plan.decoded} in its modules, and decodes a model while "
            f"loading it only if all weights share one scheme, not {schemes[0]} and {schemes[1]}; use {alike}{other}",
            schemes,
            of_tables=len({plan.scheme(tensor) for tensor in plan.linear}) == 1,
        )


def _coordinates(architecture: Architecture, super_weights: Sequence[SuperWeight]) -> dict[str, list[tuple[int, int]]]:
    """Stored name -> (row, col) of its super weights in the tensor as it is stored."""
    coordinates: dict[str, list[tuple[int, int]]] = {}
    for weight in super_weights:
        linear = architecture.weights.get(weight.name)
        place = (weight.col, weight.row) if linear is not None and linear.transposed else (weight.row, weight.col)
        coordinates.setdefault(weight.name, []).append(place)
    return coordinates


def _notes(
    tensors: Sequence[TensorPlan], of_experts: Block | None, options: CompressOptions, *, decoded: Decoded
) -> tuple[str, ...]:
    """What a user should know of the plan beside its table."""
    blocks = [tensor.block for tensor in tensors if tensor.block not in (None, options.parsed_block)]
    notes = [
        f"block {options.block_name} does not divide {count} tensors, which take {block}"
        for block, count in Counter(map(str, blocks)).items()
    ]
    if decoded and options.offset_kind == "none":
        held = "a packed embedding" if decoded is Decoded.EMBEDDING else str(decoded)
        notes.append(f"its modules cannot hold {held}: stock transformers decodes all weights while it loads them")
    if options.activations == "int8" and of_experts is not None:
        notes.append("the inputs of experts stay in float; those of the other linear layers are rounded to int8")
    return tuple(notes)


def _outliers(weights: int, super_weights: Sequence[tuple[int, int]], options: CompressOptions) -> int:
    """How many of a tensor's weights go into the sidecar."""
    if not options.restore:
        return 0
    return min(len(set(super_weights)) + int(options.outlier_fraction * weights), weights)


def _int8_inputs(architecture: Architecture, options: CompressOptions) -> bool:
    """Whether stock loaders can be told to round activations as we do, the kept channels aside: `int-quantized` knows
    rows of 8-bit codes and a scale for every token, and no experts. For all else they are told of the weights alone,
    which is safe: a float activation is closer to the original than a rounded one."""
    return (
        options.activations == "int8"
        and options.bits == 8
        and not options.bits_for
        and options.symmetric
        and options.per_token
        and isinstance(options.parsed_block, Channel | Whole)
        and all(linear.kind is not LinearKind.EXPERT for linear in architecture.weights.values())
    )


def _folded(tensors: Sequence[TensorPlan], folds: Sequence[Fold]) -> list[TensorPlan]:
    """The tensors with the folds that pay: all that read the norm are rounded, in blocks of not too many columns."""
    plans = {tensor.name: tensor for tensor in tensors}
    for fold in folds:
        readers = [plans[name] for name in fold.readers]
        if all(
            tensor.block and not tensor.transposed and columns(tensor.block, tensor.shape) <= MAX_COLUMNS_TO_SCALE
            for tensor in readers
        ):
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


def _quantized(name: str, stored: Stored, recipe: Recipe, int8_inputs: bool, *, transposed: bool) -> TensorPlan:
    shape, module = (stored.shape[0], stored.shape[1]), name.removesuffix(".weight")
    local = layouts.tensor_layout(recipe, shape, int8_inputs=int8_inputs)
    counts = {OUTLIERS: recipe.outliers}
    return TensorPlan(
        name=name,
        source=stored,
        layout={f"{module}.{key}": form for key, form in local.items()},
        recipe=recipe,
        patches=tuple(PlannedPatch(of, name, count, shape, stored.dtype) for of, count in counts.items() if count),
        super_weights=recipe.super_weights,
        int8_inputs=int8_inputs,
        transposed=transposed,
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
