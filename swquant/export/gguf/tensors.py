"""The tensors of a GGUF file: of which type each is, what the file holds of it, from a plan or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibrationless import CPU, Evidence, Group, QuantizedTensor, Recipe, dequantize, follow, moved
from exporters.errors import SwquantError
from exporters.gguf.blocks import TYPES, BlockType, encode, type_of
from exporters.gguf.names import Place, row_order
from exporters.gguf.write import Form, floats
from exporters.layouts import decoded_dtype
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.compress.plan import TensorPlan
from swquant.compress.tensor import SuperWeightCode, round_tensor
from swquant.detect.folds import fold_columns

__all__ = [
    "Content",
    "Item",
    "arranged",
    "content_of",
    "fitted_tensor",
    "form_of",
    "from_checkpoint",
    "from_plan",
    "made",
    "recipe_of",
    "with_embedding",
]


@dataclass(frozen=True)
class Item:
    """One stored tensor on its way into the file. type: of GGUF. super_weights: (row, col) in it, as it is stored, that
    are looked at again. recipe: how a checkpoint's weight is rounded again, None where its codes or floats are
    copied."""

    name: str
    type: str
    shape: tuple[int, ...]
    super_weights: tuple[tuple[int, int], ...] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Content:
    """What the file holds of a stored tensor. data: uint8 [out, bytes of a row] of blocks, or floats. super_weights:
    what it holds of them."""

    data: Tensor
    super_weights: tuple[SuperWeightCode, ...] = ()


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


def from_plan(tensors: Iterable[TensorPlan]) -> Iterator[Item]:
    """The tensors of a plan. Raises SwquantError for floats that GGUF has no type for."""
    for tensor in tensors:
        ((dtype, _),) = tensor.layout.values()
        kind = tensor.stored_as if tensor.recipe is not None else _float_type(tensor.name, dtype)
        yield Item(tensor.name, kind, tensor.source.shape)


def made(tensor: TensorPlan, weight: Tensor, evidence: Evidence, device: torch.device = CPU) -> Content:
    """Carry out the plan of one tensor, as `round_tensor` does for a checkpoint: pure, so whoever calls it anywhere
    gets the same bytes. device: where it is rounded; the result is on the CPU. Raises SwquantError."""
    if tensor.fold is not None and tensor.name in tensor.fold.readers:
        weight = fold_columns(weight, tensor.fold)
        if tensor.recipe is None:  # no type holds it, the norm is scaled all the same
            ((dtype, _),) = tensor.layout.values()
            return Content(weight.to(dtype))
    if tensor.recipe is None:
        return Content(round_tensor(tensor, weight, Evidence()).parts[tensor.name])
    kind = TYPES[tensor.stored_as]
    return _rounded(tensor.name, tensor.recipe, kind, weight, evidence, tensor.super_weights, device)


def _rounded(
    name: str,
    recipe: Recipe,
    kind: BlockType,
    weight: Tensor,
    evidence: Evidence,
    super_weights: Sequence[tuple[int, int]],
    device: torch.device = CPU,
) -> Content:
    try:
        quantized = moved(follow(recipe, weight.to(device), moved(evidence, device)).quantized, CPU)
    except ValueError as error:
        raise SwquantError(f"{name}: {error}; the source is damaged, or no model for GGUF") from None
    return Content(encode(quantized, kind), _held(quantized, weight, super_weights))


def _held(
    quantized: QuantizedTensor, original: Tensor, places: Sequence[tuple[int, int]]
) -> tuple[SuperWeightCode, ...]:
    """What llama.cpp decodes at some places: in float32."""
    if not places:
        return ()
    plain = replace(quantized, scale=quantized.scale.to(torch.float32))
    if plain.offset is not None:
        plain = replace(plain, offset=plain.offset.to(torch.float32))
    decoded = dequantize(plain, torch.float32)
    return tuple(SuperWeightCode(row, col, float(original[row, col]), float(decoded[row, col])) for row, col in places)


def _float_type(name: str, dtype: torch.dtype) -> str:
    kind = floats(dtype)
    if kind is None:
        raise SwquantError(f"{name} is stored as {str(dtype).removeprefix('torch.')}, which GGUF has no type for")
    return kind


def from_checkpoint(checkpoint: CompressedCheckpoint, kind: str, embedding: Mapping[str, str | None]) -> Iterator[Item]:
    """The tensors of a compressed checkpoint. kind: auto for the codes as they are, otherwise the type into which the
    weights, outliers restored, are rounded again. embedding: stored name of embedding or output head -> type; None
    keeps what is stored, as floats where no type holds its codes. Raises SwquantError for codes that no type holds."""
    coordinates = _super_weights(checkpoint)
    for name, stored in checkpoint.tensors.items():
        places = coordinates.get(name, ())
        if name in checkpoint.quantized_names and name in embedding and embedding[name] is None:
            held = type_of(checkpoint.quantized(name))
            floats_of = _float_type(name, _decoded_dtype(checkpoint, name))
            yield Item(name, floats_of if isinstance(held, str) else held.name, stored.shape)
        elif embedding.get(name) or (name in checkpoint.quantized_names and kind != "auto"):
            row = TYPES[embedding.get(name) or kind]
            if stored.shape[1] % row.weights and row.fallback:
                row = TYPES[row.fallback]
            if stored.shape[1] % row.weights:
                raise SwquantError(f"{name}: rows of {stored.shape[1]} weights fit no GGUF type; leave --type out")
            yield Item(name, row.name, stored.shape, places, recipe_of(row, places))
        elif name in checkpoint.quantized_names:
            held = type_of(checkpoint.quantized(name))
            if isinstance(held, str):
                raise SwquantError(f"{checkpoint.name}: {name} {held}, or export with --type Q8_0, which rounds again")
            yield Item(name, held.name, stored.shape, places)
        else:
            yield Item(name, _float_type(name, stored.dtype), stored.shape)


def content_of(checkpoint: CompressedCheckpoint, item: Item, device: torch.device = CPU) -> Content:
    """What the file holds of a checkpoint's tensor. device: where it is rounded, if it is. Raises SwquantError."""
    if item.type not in TYPES:
        weight = checkpoint.read(item.name)
        return Content(
            weight if item.name not in checkpoint.quantized_names else weight.to(_decoded_dtype(checkpoint, item.name))
        )
    kind = TYPES[item.type]
    if item.recipe is not None:
        evidence = Evidence(importance=torch.ones(item.shape[1]))
        weight = checkpoint.read(item.name).to(torch.float32)
        return _rounded(item.name, item.recipe, kind, weight, evidence, item.super_weights, device)
    quantized = checkpoint.quantized(item.name)
    original = checkpoint.read(item.name) if item.super_weights else quantized.codes
    return Content(encode(quantized, kind), _held(quantized, original, item.super_weights))


def _decoded_dtype(checkpoint: CompressedCheckpoint, name: str) -> torch.dtype:
    """What loaders of the checkpoint round a decoded weight to."""
    dtype = decoded_dtype({part: form.dtype for part, form in checkpoint.part_forms(name).items()})
    assert dtype is not None
    return dtype


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


def arranged(place: Place, form: Form, parts: Sequence[Tensor]) -> Tensor:
    """The bytes, or floats, of a place, made of the contents of its sources."""
    if form.type == "F32":
        parts = [part.to(torch.float32) + place.shift for part in parts]
    if place.heads:
        order = row_order(parts[0].shape[0], place.heads)
        parts = [part[order] for part in parts]
    return parts[0] if len(parts) == 1 else torch.stack(list(parts))
