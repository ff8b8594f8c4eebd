"""The tensors of a GGUF file: of which type each is, and how it is made, from a plan or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from calibrationless import Evidence, Group, QuantizedTensor, Recipe, dequantize, follow
from exporters.errors import SwquantError
from exporters.gguf.blocks import TYPES, BlockType, encode, type_of
from exporters.gguf.names import Place, row_order
from exporters.gguf.write import Form, floats
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.compress.evidence import evidence_for
from swquant.compress.plan import TensorPlan
from swquant.compress.tensor import SuperWeightCode, round_tensor
from swquant.compress.writing import Prepared
from swquant.detect.folds import fold_columns
from swquant.detect.own_text import SelfText

__all__ = ["Item", "fitted_tensor", "form_of", "from_checkpoint", "from_plan", "made", "recipe_of", "with_embedding"]


@dataclass(frozen=True)
class Item:
    """One stored tensor on its way into the file. type: of GGUF. make: the rounded weight, or floats. super_weights:
    places in it, as it is stored, that are looked at again; original: gives what they were."""

    name: str
    type: str
    shape: tuple[int, ...]
    make: Callable[[], QuantizedTensor | Tensor]
    super_weights: tuple[tuple[int, int], ...] = ()
    original: Callable[[], Tensor] | None = None


def recipe_of(kind: BlockType, super_weights: tuple[tuple[int, int], ...] = ()) -> Recipe:
    """How a weight is rounded into a type."""
    return Recipe(
        Group(kind.block),
        kind.bits,
        offsets=kind.offsets,
        scale_dtype=torch.float16,
        super_weights=super_weights,
    )


def fitted_tensor(tensor: TensorPlan, kind: BlockType) -> tuple[TensorPlan, str | None]:
    """The plan of a tensor with the type that its shape takes, and what to say where that is another."""
    if tensor.recipe is None:
        return tensor, None
    inputs, note = tensor.shape[1], None
    if inputs % kind.weights and kind.fallback is not None:
        note = f"{kind.name} takes rows of a multiple of {kind.weights} weights; others take {kind.fallback}"
        kind = TYPES[kind.fallback]
    if inputs % kind.weights or tensor.transposed:
        reason = f"rows of {inputs} weights, no multiple of {kind.weights}, fit no GGUF type"
        layout = {tensor.name: (torch.float16, tensor.source.shape)}
        return replace(tensor, recipe=None, reason=reason, layout=layout, patches=()), None
    layout = {tensor.name: (torch.uint8, (tensor.shape[0], kind.row_bytes(inputs)))}
    recipe = recipe_of(kind, tensor.super_weights)
    return replace(tensor, recipe=recipe, layout=layout, patches=(), stored_as=kind.name), note


def with_embedding(tensor: TensorPlan, kind: str) -> TensorPlan:
    """The plan of an embedding or output head that is stored as a type."""
    row = TYPES[kind]
    if tensor.shape[1] % row.weights:
        raise SwquantError(
            f"--embedding-type {kind}: {tensor.name} has rows of {tensor.shape[1]} weights, no multiple of {row.weights}; use "
            f"{row.fallback or 'stored'}"
        )
    layout = {tensor.name: (torch.uint8, (tensor.shape[0], row.row_bytes(tensor.shape[1])))}
    return replace(tensor, recipe=recipe_of(row), reason="", layout=layout, stored_as=kind)


def from_plan(prepared: Prepared, text: SelfText | None, embeddings: frozenset[str]) -> Iterator[Item]:
    """What a plan makes of each tensor. embeddings: stored names of those that are rounded without evidence."""
    checkpoint = prepared.checkpoint
    for tensor in prepared.plan.tensors:
        shape = tensor.source.shape
        if tensor.recipe is None:
            ((dtype, _),) = tensor.layout.values()
            yield Item(tensor.name, _float_type(tensor.name, dtype), shape, partial(_dense, checkpoint, tensor))
            continue
        evidence = partial(_evidence, tensor, prepared, text, tensor.name in embeddings)
        yield Item(
            tensor.name,
            tensor.stored_as,
            shape,
            partial(_rounded, checkpoint, tensor, evidence),
            tensor.super_weights,
            partial(_weight, checkpoint, tensor),
        )


def _float_type(name: str, dtype: torch.dtype) -> str:
    kind = floats(dtype)
    if kind is None:
        raise SwquantError(f"{name} is stored as {str(dtype).removeprefix('torch.')}, which GGUF has no type for")
    return kind


def _dense(checkpoint: Checkpoint, tensor: TensorPlan) -> Tensor:
    if (
        tensor.fold is not None and tensor.name in tensor.fold.readers
    ):  # no type holds it, the norm is scaled all the same
        ((dtype, _),) = tensor.layout.values()
        return _weight(checkpoint, tensor).to(dtype)
    return round_tensor(tensor, checkpoint.read(tensor.name), Evidence()).parts[tensor.name]


def _weight(checkpoint: Checkpoint, tensor: TensorPlan) -> Tensor:
    weight = checkpoint.read(tensor.name)
    return weight if tensor.fold is None else fold_columns(weight, tensor.fold)


def _evidence(tensor: TensorPlan, prepared: Prepared, text: SelfText | None, embedding: bool) -> Evidence:
    if embedding:  # read row by row, or by the last norm: no input of it was looked at
        ones = torch.ones(tensor.shape[1])
        return Evidence(importance=None if prepared.plan.options.refinement == "none" else ones)
    return evidence_for(tensor, prepared.found, prepared.plan.options.refinement, text)


def _rounded(checkpoint: Checkpoint, tensor: TensorPlan, evidence: Callable[[], Evidence]) -> QuantizedTensor:
    assert tensor.recipe is not None
    return _followed(tensor.name, tensor.recipe, _weight(checkpoint, tensor), evidence())


def _followed(name: str, recipe: Recipe, weight: Tensor, evidence: Evidence) -> QuantizedTensor:
    try:
        return follow(recipe, weight, evidence).quantized
    except ValueError as error:
        raise SwquantError(f"{name}: {error}; the source is damaged, or no model for GGUF") from None


def from_checkpoint(checkpoint: CompressedCheckpoint, kind: str, embedding: Mapping[str, str]) -> Iterator[Item]:
    """The tensors of a compressed checkpoint. kind: auto for the codes as they are, otherwise the type into which the
    weights, outliers restored, are rounded again. embedding: stored name -> type. Raises SwquantError for codes that no
    type holds."""
    coordinates = _super_weights(checkpoint)
    for name, stored in checkpoint.tensors.items():
        places = coordinates.get(name, ())
        if name in embedding or (name in checkpoint.quantized_names and kind != "auto"):
            row = TYPES[embedding.get(name, kind)]
            if stored.shape[1] % row.weights and row.fallback:
                row = TYPES[row.fallback]
            if stored.shape[1] % row.weights:
                raise SwquantError(f"{name}: rows of {stored.shape[1]} weights fit no GGUF type; leave --type out")
            evidence = Evidence(importance=torch.ones(stored.shape[1]))
            make = partial(_again, checkpoint, name, recipe_of(row, places), evidence)
            yield Item(name, row.name, stored.shape, make, places, partial(checkpoint.read, name))
        elif name in checkpoint.quantized_names:
            held = type_of(checkpoint.quantized(name))
            if isinstance(held, str):
                raise SwquantError(f"{checkpoint.name}: {name} {held}, or export with --type Q8_0, which rounds again")
            original = partial(checkpoint.read, name)
            yield Item(name, held.name, stored.shape, partial(checkpoint.quantized, name), places, original)
        else:
            yield Item(name, _float_type(name, stored.dtype), stored.shape, partial(checkpoint.read, name))


def _again(checkpoint: CompressedCheckpoint, name: str, recipe: Recipe, evidence: Evidence) -> QuantizedTensor:
    return _followed(name, recipe, checkpoint.read(name).to(torch.float32), evidence)


def _super_weights(checkpoint: CompressedCheckpoint) -> dict[str, tuple[tuple[int, int], ...]]:
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for weight in checkpoint.manifest["detection"]["super_weights"]:
        found[weight["name"]] = (*found.get(weight["name"], ()), (weight["row"], weight["col"]))
    return found


def form_of(place: Place, items: Mapping[str, Item]) -> Form:
    """What is written for a place: the experts of a mixture are one tensor of one type."""
    parts = [items[name] for name in place.sources]
    first, stacked = parts[0], len(parts) > 1
    if odd := next((part for part in parts if (part.type, part.shape) != (first.type, first.shape)), None):
        raise SwquantError(
            f"{odd.name} is {odd.type}, {first.name} {first.type}: the experts of a layer share one type"
        )
    shape = (len(parts), *first.shape) if stacked or (".ffn_" in place.name and "_exps." in place.name) else first.shape
    return Form(place.name, "F32" if place.float32 or len(shape) == 1 else first.type, tuple(shape))


def made(place: Place, items: Mapping[str, Item], form: Form, held: list[SuperWeightCode]) -> Tensor:
    """The bytes, or floats, of a place. held: what the file has of super weights is added."""
    order = row_order(items[place.sources[0]].shape[0], place.heads) if place.heads else None
    parts = []
    for name in place.sources:
        item = items[name]
        value = item.make()
        if isinstance(value, QuantizedTensor):
            held += _held(item, value)
            value = encode(value, TYPES[item.type])
        else:
            value = (value.to(torch.float32) + place.shift) if form.type == "F32" else value
        parts.append(value if order is None else value[order])
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _held(item: Item, quantized: QuantizedTensor) -> Iterator[SuperWeightCode]:
    if not item.super_weights:
        return
    assert item.original is not None
    plain = replace(quantized, scale=quantized.scale.to(torch.float32))
    if plain.offset is not None:
        plain = replace(plain, offset=plain.offset.to(torch.float32))
    decoded, original = dequantize(plain, torch.float32), item.original()
    for row, col in item.super_weights:
        yield SuperWeightCode(row, col, float(original[row, col]), float(decoded[row, col]))
