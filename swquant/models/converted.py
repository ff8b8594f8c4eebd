"""A checkpoint under the names of the model that is built of it, where transformers rearranges tensors while loading.

Three convolutions become one, a stored `gate_up_proj` becomes two weights, q, k and v lie in one tensor or three. Its
loader sends all that through the decoder of packed weights as soon as a checkpoint is compressed, which
drops what is not packed and has no place for what is. As the model holds them it takes all of them as they are, so
that is how they are planned, rounded and written. Experts of a mixture stay as they are stored: those it merges packed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.models.stock import empty_model

__all__ = ["Conversion", "ConvertedCheckpoint", "as_built", "sources"]


@dataclass(frozen=True)
class Conversion:
    """What transformers does to some stored tensors. target: the first parameter that comes of it. sources: (stored
    name, pattern that it matches), in the order in which they are collected."""

    converter: WeightConverter
    target: str
    sources: tuple[tuple[str, str], ...]
    model: PreTrainedModel

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter -> tensor."""
        converter: Any = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, lambda tensor=tensors[name]: tensor)
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class ConvertedCheckpoint(Checkpoint):
    """Another checkpoint, some of its tensors as the model holds them."""

    def __init__(self, source: Checkpoint, made: Mapping[str, Conversion], tensors: Mapping[str, Stored]) -> None:
        self._source, self._made = source, made
        self.tensors = tensors
        self.kind = source.kind  # type: ignore[misc]
        self.name, self.folder, self.fingerprint = source.name, source.folder, source.fingerprint
        self.config, self.raw_config = source.config, source.raw_config
        self.trust_remote_code = source.trust_remote_code

    def read(self, name: str) -> Tensor:
        conversion = self._made.get(name)
        if conversion is None:
            return self._source.read(name)
        tensors = {source: self._source.read(source) for source, _ in conversion.sources}
        try:
            return conversion.run(tensors)[name].contiguous()
        except Exception as error:  # it went well on the meta device: what differs is memory, or damage
            raise SwquantError(f"{self.name}: transformers cannot make {name} ({first_line(error)})") from None

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    @property
    def fills_folder(self) -> bool:
        return self._source.fills_folder

    @property
    def notes(self) -> tuple[str, ...]:
        note = f"{len(self._made)} tensors are stored as the model holds them, not as the original does"
        return (*self._source.notes, note)

    @property
    def is_compressed(self) -> bool:
        return self._source.is_compressed

    @property
    def stores_floats(self) -> bool:
        return self._source.stores_floats

    @property
    def can_stay_on_disk(self) -> bool:
        return self._source.can_stay_on_disk

    @property
    def generation(self) -> dict[str, Any]:
        return self._source.generation

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        return self._source.dense_dtype(stored)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._source.tokenizer()

    def save_companions(self, folder: Path) -> None:
        self._source.save_companions(folder)

    def close(self) -> None:
        self._source.close()


def as_built(checkpoint: Checkpoint, model: PreTrainedModel | None = None) -> Checkpoint:
    """The checkpoint, with what transformers rearranges while loading as the model holds it. model: its own, on the
    meta device. Returned as it is where nothing is rearranged, or where this is a compressed checkpoint."""
    if checkpoint.is_compressed:
        return checkpoint
    model = model if model is not None else empty_model(checkpoint)
    state = model.state_dict()
    made: dict[str, Conversion] = {}
    forms: dict[str, dict[str, Stored]] = {}  # first source -> what takes the place of it and of the others
    gone: set[str] = set()
    for conversion in _conversions(checkpoint, model, state):
        names = [name for name, _ in conversion.sources]
        stored = {name: checkpoint.tensors[name] for name in names}
        empty = {name: torch.empty(form.shape, dtype=form.dtype, device="meta") for name, form in stored.items()}
        try:
            result = conversion.run(empty)
        except Exception:  # transformers raises nearly everything here; the rehearsal says what becomes of it
            continue
        if not all(name in state and tensor.shape == state[name].shape for name, tensor in result.items()):
            continue
        made |= dict.fromkeys(result, conversion)
        forms[names[0]] = {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in result.items()}
        gone |= {*names}
    if not made:
        return checkpoint
    tensors: dict[str, Stored] = {}
    for name, form in checkpoint.tensors.items():
        tensors |= forms.get(name, {}) if name in gone else {name: form}
    return ConvertedCheckpoint(checkpoint, made, tensors)


def sources(
    names: Iterable[str], model: PreTrainedModel
) -> tuple[dict[str, list[tuple[str, str | None]]], dict[str, WeightConverter]]:
    """(parameter or buffer -> what it is made of, in transformers' order; pattern -> its converter). What it is made
    of: (stored name, pattern of the conversion, None where it is only renamed)."""
    mapping, state = get_model_conversion_mapping(model), dict(model.state_dict())
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        found.setdefault(target, []).append((name, pattern))
    return found, {pattern: entry for entry in converters for pattern in entry.source_patterns}


def _conversions(checkpoint: Checkpoint, model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[Conversion]:
    """Every conversion that transformers would make of this checkpoint, the merging of experts aside."""
    found, converters = sources(checkpoint.tensors, model)
    made: list[Conversion] = []
    for target, stored in found.items():
        parts = tuple((name, pattern) for name, pattern in stored if pattern is not None and name not in state)
        if target in state and parts and not _merges_experts(converters[parts[0][1]]):
            made.append(Conversion(converters[parts[0][1]], target, parts, model))
    return made


def _merges_experts(converter: WeightConverter) -> bool:
    """Whether it is a conversion that transformers makes of packed weights, too."""
    steps = converter.operations
    return any(isinstance(step, MergeModulelist) for step in steps) and all(
        isinstance(step, MergeModulelist | Concatenate) for step in steps
    )
