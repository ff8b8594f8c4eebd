"""A student: the teacher without some of its layers, an ordinary model for whoever loads it.

Its configuration is the teacher's with everything that is said per layer cut alike; its weights are the teacher's
under new numbers. Whether a layer is still the kind of layer that it was (attention over a window or over all, with
rotary positions or without, …) is not read from a list of keys but seen: both models are built without memory, and
every kept layer must have the same modules, shapes and settings in both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.guard import silent_transformers
from swquant.models.rehearsal import rehearse
from swquant.models.stock import empty_model
from swquant.output.dense import Written, stored_form
from swquant.pr_moe import PrMoeConfig

__all__ = ["StudentCheckpoint", "cut_config", "cut_names", "layer_list", "student_config"]

# Of a module, what numbers it or says that it trains: no setting.
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "layer_index", "training", "block_idx")


def layer_list(checkpoint: Checkpoint, layers: Sequence[str]) -> str:
    """The name of the list that the decoder layers lie in: `model.layers` for `model.layers.0`, …"""
    names = {name.rpartition(".")[0] for name in layers}
    if len(names) != 1:
        raise SwquantError(f"{checkpoint.name}: its decoder layers lie in several lists; distill cannot take some away")
    return names.pop()


def student_config(checkpoint: Checkpoint, keep: Sequence[int], depth: int) -> dict[str, Any]:
    """What the student's config.json says. keep: the teacher's layers that stay, ascending."""
    if not isinstance(checkpoint.config, PrMoeConfig):
        return cut_config(checkpoint.raw_config, checkpoint.config, keep, depth)
    raw = dict(checkpoint.raw_config)
    raw["text_config"] = cut_config(raw["text_config"], checkpoint.config.text_config, keep, depth)
    raw["mixtures"] = [
        {**item, "layer": keep.index(item["layer"]), "module": _renumbered(item["module"], item["layer"], keep)}
        for item in checkpoint.config.mixtures
        if item["layer"] in keep
    ]
    return raw


def _renumbered(module: str, layer: int, keep: Sequence[int]) -> str:
    return re.sub(rf"\.{layer}\.", f".{list(keep).index(layer)}.", module, count=1)


def cut_config(raw: Mapping[str, Any], config: Any, keep: Sequence[int], depth: int) -> dict[str, Any]:
    """A configuration with `keep` of `depth` layers. raw: as it is written; config: as transformers understands it,
    which says per layer also what the file leaves to a rule (every sixth layer, the last ones, …)."""
    understood = config.to_dict()
    lists = {key: value for key, value in understood.items() if _per_layer(key, value, depth)}
    cut: dict[str, Any] = {**raw, **lists}
    for key, value in cut.items():
        if _per_layer(key, value, depth):
            cut[key] = [value[layer] for layer in keep]
        elif _numbers_layers(key, value, depth):
            cut[key] = [keep.index(layer) for layer in value if layer in keep]
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    cut[key] = len(keep)
    return cut


def _per_layer(key: str, value: Any, depth: int) -> bool:
    """Whether a key says something of every layer in turn."""
    tokens = key.endswith(("_id", "_ids")) or key in ("architectures", "id2label", "label2id")
    return isinstance(value, list | tuple) and len(value) == depth and not tokens and (depth > 4 or "layer" in key)


def _numbers_layers(key: str, value: Any, depth: int) -> bool:
    """Whether a key is a list of numbers of layers."""
    return (
        "layer" in key
        and isinstance(value, list | tuple)
        and len(value) < depth
        and all(isinstance(layer, int) and 0 <= layer < depth for layer in value)
    )


def cut_names(names: Sequence[str], stem: str, keep: Sequence[int]) -> dict[str, str]:
    """Name in the student -> stored name; those of other layers are left out. stem: the name of the list of layers in
    the model, of which files may leave out the front (`h.3.…` for `transformer.h.3.…`)."""
    leaf = re.escape(stem.rpartition(".")[2])
    pattern = re.compile(rf"^((?:.*?\.)??{leaf})\.(\d+)\.(.*)$")
    numbers = {layer: number for number, layer in enumerate(keep)}
    old: dict[str, str] = {}
    for name in names:
        match = pattern.match(name)
        if match is None:
            old[name] = name
        elif int(match[2]) in numbers:
            old[f"{match[1]}.{numbers[int(match[2])]}.{match[3]}"] = name
    return old


class StudentCheckpoint(Checkpoint):
    """The teacher without some layers, read from the teacher's files: it can be built, run and written like any
    other."""

    def __init__(self, teacher: Checkpoint, keep: Sequence[int], layers: Sequence[str]) -> None:
        """keep: the layers that stay, ascending. layers: the names of the teacher's. Raises SwquantError where a layer
        would become another kind of layer, or stock transformers would not find all weights."""
        stem = layer_list(teacher, layers)
        self._teacher, self.old = teacher, cut_names(tuple(teacher.tensors), stem, keep)
        self.tensors = {new: teacher.tensors[old] for new, old in self.old.items()}
        self.kind = teacher.kind  # type: ignore[misc]
        self.name, self.folder = f"{teacher.name} without {len(layers) - len(keep)} layers", teacher.folder
        self.fingerprint = hashlib.sha256(f"{teacher.fingerprint} {list(keep)}".encode()).hexdigest()
        self.trust_remote_code = teacher.trust_remote_code
        self.raw_config = student_config(teacher, keep, len(layers))
        self.config = _understood(self.raw_config, teacher.name)
        _check_layers(teacher, self, stem, keep)
        _check_loads(teacher, self)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._teacher.files

    @property
    def fills_folder(self) -> bool:
        return self._teacher.fills_folder

    @property
    def stores_floats(self) -> bool:
        return self._teacher.stores_floats

    @property
    def generation(self) -> dict[str, Any]:
        return self._teacher.generation

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        return self._teacher.dense_dtype(stored)

    def read(self, name: str) -> Tensor:
        return self._teacher.read(self.old[name])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._teacher.tokenizer()

    def save_companions(self, folder: Path) -> None:
        self._teacher.save_companions(folder)

    def close(self) -> None:
        self._teacher.close()

    def written(self, trained: Mapping[str, Tensor] | None = None) -> dict[str, Written]:
        """Its tensors as they are written. trained: stored name -> what takes the place of the teacher's."""
        new = trained or {}
        return {
            name: Written(stored_form(self, name), partial(new.__getitem__ if name in new else self.read, name))
            for name in self.tensors
        }


def _understood(config: Mapping[str, Any], name: str) -> Any:
    """The configuration as transformers reads it. Raises SwquantError where it does not."""
    try:
        with silent_transformers():
            return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(f"{name}: transformers takes no fewer layers of it ({first_line(error)})") from None


def _check_loads(teacher: Checkpoint, student: StudentCheckpoint) -> None:
    """Raise SwquantError where stock transformers would miss weights of the student, or find some left over."""
    layout = {name: (form.dtype, form.shape) for name, form in student.tensors.items()}
    whole = {name: (form.dtype, form.shape) for name, form in teacher.tensors.items()}
    seen = rehearse(student, student.raw_config, layout)
    left_over = len(seen.unexpected) > len(rehearse(teacher, dict(teacher.raw_config), whole).unexpected)
    problem = seen.problem or (f"{seen.unexpected[0]} is left over" if left_over else "")
    if problem:
        raise SwquantError(
            f"{teacher.name}: a student of these layers would not load ({problem}); distill cannot take layers of this "
            "architecture away"
        )


def _check_layers(teacher: Checkpoint, student: StudentCheckpoint, stem: str, keep: Sequence[int]) -> None:
    """Raise SwquantError unless every kept layer is what it was."""
    whole, cut = empty_model(teacher), empty_model(student)
    for new, old in enumerate(keep):
        before, after = _traits(whole, f"{stem}.{old}"), _traits(cut, f"{stem}.{new}")
        if before != after:
            key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
            raise SwquantError(
                f"{teacher.name}: as layer {new} of the student, layer {old} would be another kind of layer ({key}: "
                f"{before.get(key)} -> {after.get(key)}); keep layers at which its pattern goes on"
            )


def _traits(model: PreTrainedModel, layer: str) -> dict[str, Any]:
    """What a layer is made of: of every module its class and settings, of every parameter its shape."""
    return dict(_all_traits(model.get_submodule(layer)))


def _all_traits(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        yield f"{name or 'layer'}", type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, int | float | str | None) and not key.startswith("_") and key not in _NUMBERS:
                yield f"{name}.{key}".lstrip("."), value
    for name, parameter in layer.named_parameters():
        yield name, tuple(parameter.shape)
