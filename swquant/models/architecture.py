"""What a model is made of: which stored tensors are linear weights, in which layer, and which are down projections.

transformers builds the model without memory (on the meta device) and says under which parameter each stored
tensor ends up; its modules say the rest. Five kinds of linear weights exist, see `LinearKind`.

Everything else gets a reason why it is not compressed. To add an architecture whose down projection has an
unusual name, add the name to `DOWN_PROJECTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from calibrationless import Watch
from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import Checkpoint, check_depth

__all__ = ["DOWN_PROJECTIONS", "Architecture", "Dense", "LinearKind", "LinearWeight", "describe", "empty_model"]

DOWN_PROJECTIONS = (
    "down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2", "wo", "fc_out", "output_dense", "linear_2", "lin2", "output_linear",
)  # fmt: skip
_ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


class LinearKind(StrEnum):
    """What computes with a linear weight, and how it is stored."""

    LINEAR = "linear"  # nn.Linear, [out, in]
    CUSTOM = "custom"  # a subclass of nn.Linear with a forward of its own, [out, in]
    CONV1D = "conv1d"  # GPT-2's Conv1D, [in, out]
    EXPERT = "expert"  # one expert of a mixture, stored alone [out, in], fused with the others while loading
    FUSED = "fused"  # all experts of a layer, one 3-D tensor


@dataclass(frozen=True)
class LinearWeight:
    """A stored tensor that is a linear weight of a decoder layer.

    module, parameter, expert: where the model holds it.
    watch: name under which the probe sees it (fused tensors: one name per expert, `name[3]`).
    """

    name: str
    kind: LinearKind
    layer: int
    module: str
    parameter: str
    expert: int | None
    down: bool
    watch: str

    @property
    def transposed(self) -> bool:
        return self.kind is LinearKind.CONV1D


@dataclass(frozen=True)
class Dense:
    """A tensor is not rounded, and why."""

    reason: str


@dataclass(frozen=True)
class Architecture:
    """layers: names of the decoder layers. weights: linear weights by stored name. dense: stored name -> why it is
    none. watches: what the probe looks at. downs: watched down projections -> layer. vectors: parameter with one
    dimension (gains and biases of norms) -> stored name."""

    layers: tuple[str, ...]
    weights: Mapping[str, LinearWeight]
    dense: Mapping[str, str]
    watches: tuple[Watch, ...]
    downs: Mapping[str, int]
    vectors: Mapping[str, str]


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model without memory for its weights. Raises SwquantError where transformers has no causal model for it, or
    where the configuration claims so many weights that making room for them could bring down the machine."""
    check_depth(checkpoint.name, checkpoint.config, len(checkpoint.tensors))
    model = _build(checkpoint)
    stored = sum(tensor.numel for tensor in checkpoint.tensors.values())
    if model.num_parameters() > 4 * stored:
        raise SwquantError(
            f"{checkpoint.name}: the configuration claims {model.num_parameters():,} weights, but there are only {stored:,}; "
            "it belongs to another model"
        )
    return model


def _build(checkpoint: Checkpoint) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(
            f"{checkpoint.name}: transformers cannot build this model ({first_line(error)}); swquant compresses causal language models"
        ) from None


def _decoder_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the decoder layers: the outermost list of as many modules as the configuration has layers."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and depth and len(module) == depth:
            return tuple(f"{name}.{index}" for index in range(depth))
    raise SwquantError(
        f"{type(model).__name__}: no list of {depth} decoder layers found; this architecture is not known"
    )


def _features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D."""
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if isinstance(module, Conv1D) else (rows, cols)


def _down_projections(model: PreTrainedModel, layers: tuple[str, ...], hidden: int) -> set[str]:
    """Names of the modules that write an MLP's result into the residual stream: outside attention, `hidden` outputs,
    with a name that says so or, failing that, the last of its parent."""
    found: set[str] = set()
    for layer in layers:
        by_parent: dict[str, list[str]] = {}
        for local, module in model.get_submodule(layer).named_modules():
            parent, _, leaf = local.rpartition(".")
            outside = not _ATTENTION.search(parent) and leaf not in _ROUTERS
            if outside and isinstance(module, nn.Linear | Conv1D) and _features(module)[0] == hidden:
                by_parent.setdefault(parent, []).append(local)
        for candidates in by_parent.values():
            named = [name for name in candidates if name.rpartition(".")[2] in DOWN_PROJECTIONS]
            found.add(f"{layer}.{(named or candidates)[-1]}")
    return found


class _Renamer:
    """Stored name -> (parameter of the model, whether it is merged with other experts, whether it is known)."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def __call__(self, name: str) -> tuple[str, str]:
        """(parameter, how): how is `as stored`, `merged` (experts) or `converted` (something else)."""
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state:
            return (name, "as stored") if name in self._state else ("", "unknown")
        if pattern is None:
            return target, "as stored"
        merged = all(isinstance(step, MergeModulelist | Concatenate) for step in self._by_pattern[pattern].operations)
        return target, "merged" if merged else "converted"


def describe(checkpoint: Checkpoint, model: PreTrainedModel | None = None) -> Architecture:
    """Sort every tensor of a checkpoint into linear weights and others with a reason."""
    model = model if model is not None else empty_model(checkpoint)
    layers = _decoder_layers(model)
    hidden = model.config.get_text_config().hidden_size
    downs = _down_projections(model, layers, hidden)
    rename = _Renamer(model)
    state = model.state_dict()
    weights: dict[str, LinearWeight] = {}
    dense: dict[str, str] = {}
    vectors: dict[str, str] = {}
    for name, stored in checkpoint.tensors.items():
        target, how = rename(name)
        layer = next((index for index, prefix in enumerate(layers) if target.startswith(prefix + ".")), None)
        if how == "unknown":
            dense[name] = "not a parameter of the model"
        elif how == "converted":
            dense[name] = "rearranged by transformers while loading"
        elif stored.numel == 0:
            dense[name] = "empty"
        elif len(stored.shape) < 2:
            dense[name] = "not a matrix"
            vectors[target] = name
        elif layer is None:
            dense[name] = _outside(target, model)
        else:
            linear = _classify(name, target, how, layer, model, downs, hidden, tuple(state[target].shape))
            if isinstance(linear, Dense):
                dense[name] = linear.reason
            else:
                weights[name] = linear
    watches = _watches(weights.values(), model)
    return Architecture(
        layers=layers,
        weights=weights,
        dense=dense,
        watches=watches,
        downs={watch.name: _layer_of(watch.module, layers) for watch in watches if watch.down},
        vectors=vectors,
    )


def _layer_of(module: str, layers: tuple[str, ...]) -> int:
    return next(index for index, prefix in enumerate(layers) if module.startswith(prefix + "."))


def _outside(target: str, model: PreTrainedModel) -> str:
    """Why a tensor outside the decoder layers stays dense."""
    module = model.get_submodule(target.rpartition(".")[0])
    if module is model.get_input_embeddings():
        return "embedding"
    if module is model.get_output_embeddings():
        return "lm_head"
    return "embedding" if isinstance(module, nn.Embedding) else "outside the decoder layers"


def _kind(module: nn.Module) -> LinearKind:
    if isinstance(module, Conv1D):
        return LinearKind.CONV1D
    return LinearKind.LINEAR if type(module).forward is nn.Linear.forward else LinearKind.CUSTOM


def _classify(
    name: str,
    target: str,
    how: str,
    layer: int,
    model: PreTrainedModel,
    downs: set[str],
    hidden: int,
    shape: tuple[int, ...],
) -> LinearWeight | Dense:
    module_name, _, parameter = target.rpartition(".")
    module = model.get_submodule(module_name)
    if len(shape) == 3 and "expert" in module_name:
        down = parameter in DOWN_PROJECTIONS and hidden in shape[1:]
        if how == "as stored":
            return LinearWeight(name, LinearKind.FUSED, layer, module_name, parameter, None, down, name)
        index = re.search(r"experts\.(\d+)\.", name)
        if index is None:
            return Dense("expert without a number")
        expert = int(index[1])
        # Projections that are concatenated (gate and up) share their input, so they share the watch.
        watch = name if down else f"{target}[{expert}]"
        return LinearWeight(name, LinearKind.EXPERT, layer, module_name, parameter, expert, down, watch)
    if module_name.rpartition(".")[2] in _ROUTERS:
        return Dense("router")
    if parameter == "weight" and isinstance(module, nn.Linear | Conv1D):
        return LinearWeight(name, _kind(module), layer, module_name, parameter, None, module_name in downs, name)
    return Dense(f"{type(module).__name__} is not a linear layer")


def _watches(weights: Iterable[LinearWeight], model: PreTrainedModel) -> tuple[Watch, ...]:
    watches: dict[str, Watch] = {}
    for weight in weights:
        if weight.kind is LinearKind.FUSED:
            experts = model.get_submodule(weight.module)
            transposed = bool(getattr(experts, "is_transposed", False))
            for expert in range(getattr(experts, weight.parameter).shape[0]):
                name = f"{weight.name}[{expert}]"
                watches[name] = Watch(name, weight.module, weight.parameter, expert, weight.down, transposed)
        else:
            watches.setdefault(
                weight.watch,
                Watch(weight.watch, weight.module, weight.parameter, weight.expert, weight.down, weight.transposed),
            )
    return tuple(watches.values())
