"""What a model is made of: which stored tensors are linear weights, in which layer, and which are down projections.

transformers builds the model without memory (on the meta device) and says under which parameter each stored
tensor ends up; its modules say the rest. Five kinds of linear weights exist, see `LinearKind`.

Everything else gets a reason why it is not compressed. To add an architecture whose down projection has an
unusual name, add the name to `DOWN_PROJECTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import nn
from transformers import PreTrainedModel
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
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.schema import UNUSED
from swquant.models.stock import empty_model, table_modules

__all__ = ["DOWN_PROJECTIONS", "Architecture", "Dense", "LinearKind", "LinearWeight", "describe"]

DOWN_PROJECTIONS = (
    "down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2", "wo", "fc_out", "output_dense", "linear_2", "lin2", "output_linear",
)  # fmt: skip
_ROUTERS = ("gate", "router", "shared_expert_gate", "classifier", "coefficient")
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
    """layers: names of the decoder layers, of the module that each ends with. parts: of every layer, the names of the
    modules that are it, mostly one. weights: linear weights by stored name. dense: stored name -> why it is
    none. watches: what the probe looks at. downs: watched down projections -> layer. vectors: parameter with one
    dimension (gains and biases of norms) -> stored name. targets: stored name -> parameter of the model, where one is
    the other. tied: stored name -> the stored name of the tensor that the model uses in its place. embedding, head:
    stored names of what tokens are looked up in and what makes the logits (watched under this name), equal where one is
    stored for both, "" where none is as the model holds it. lost: matrices of the decoder layers among `dense`."""

    layers: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    weights: Mapping[str, LinearWeight]
    dense: Mapping[str, str]
    watches: tuple[Watch, ...]
    downs: Mapping[str, int]
    vectors: Mapping[str, str]
    targets: Mapping[str, str]
    tied: Mapping[str, str]
    embedding: str = ""
    head: str = ""
    lost: frozenset[str] = frozenset()

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a stored tensor lies in, None for one outside."""
        linear = self.weights.get(name)
        return linear.layer if linear is not None else _index(self.parts, self.targets.get(name, name))

    def without(self, dense: Mapping[str, str]) -> Architecture:
        """With some linear weights counted as dense: stored name -> why."""
        weights = {name: weight for name, weight in self.weights.items() if name not in dense}
        return replace(self, weights=weights, dense={**self.dense, **dense}, lost=self.lost | {*dense})


@dataclass(frozen=True)
class _Layers:
    """prefixes: of every layer, the names of the modules that are it. outputs: the module that each layer ends with."""

    prefixes: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]

    def index(self, name: str) -> int | None:
        """The layer that a module or parameter lies in."""
        return _index(self.prefixes, name)


def _index(layers: Iterable[tuple[str, ...]], name: str) -> int | None:
    found = (index for index, parts in enumerate(layers) if any(name.startswith(part + ".") for part in parts))
    return next(found, None)


def _decoder_layers(model: PreTrainedModel) -> _Layers:
    """The decoder layers of the language model, never those of a vision tower beside it: of the outermost lists of
    modules, the first as long as the configuration says, otherwise the one with most weights. Where the layers of a
    list have no MLP (XLM keeps attentions and MLPs in lists of their own), the lists beside it belong to them."""
    text = model.get_decoder()
    if not any(_outermost_lists(text)):  # a head that is called decoder, for example
        text = model
    root = next((name for name, module in model.named_modules() if module is text), "")
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {f"{root}.{name}" if root else name: module for name, module in _outermost_lists(text)}
    holders = [name for name, module in lists.items() if any(isinstance(m, _LINEAR) for m in module.modules())]
    if not holders:
        raise SwquantError(f"{type(model).__name__}: no list of decoder layers found; this architecture is not known")
    fitting = [name for name in holders if len(lists[name]) == depth]
    chosen = fitting[0] if fitting else max(holders, key=lambda name: sum(map(torch.numel, lists[name].parameters())))
    together = [chosen]
    parent = chosen.rpartition(".")[0]
    if len(fitting) > 1 and all(_is_attention(layer) for layer in lists[chosen]):
        together = [name for name in lists if name.rpartition(".")[0] == parent and len(lists[name]) == depth]
    numbers = range(len(lists[chosen]))
    return _Layers(
        tuple(tuple(f"{name}.{index}" for name in together) for index in numbers),
        tuple(f"{together[-1]}.{index}" for index in numbers),
    )


_LINEAR = (nn.Linear, Conv1D)


def _outermost_lists(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that lie in no other list, in the order of the model."""
    inside: str | None = None
    for name, module in root.named_modules():
        if inside is not None and name.startswith(inside + "."):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            inside = name
            yield name, module


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention, by its class; one of a layer with linear or self attention is a layer."""
    name = type(module).__name__
    return bool(_ATTENTION.search(name)) and not re.search("layer|block", name, re.IGNORECASE)


def _features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear or Conv1D."""
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if isinstance(module, Conv1D) else (rows, cols)


def _down_projections(model: PreTrainedModel, layers: _Layers, hidden: int) -> set[str]:
    """Names of the modules that write an MLP's result into the residual stream: outside attention, `hidden` outputs,
    with a name that says so or, failing that, the last of its parent."""
    found: set[str] = set()
    for layer in (prefix for prefixes in layers.prefixes for prefix in prefixes):
        if _is_attention(model.get_submodule(layer)):
            continue
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
    hidden = _hidden_size(model)
    downs = _down_projections(model, layers, hidden)
    rename = _Renamer(model)
    state, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
    weights: dict[str, LinearWeight] = {}
    dense: dict[str, str] = {}
    vectors: dict[str, str] = {}
    targets: dict[str, str] = {}
    lost: set[str] = set()
    for name, stored in checkpoint.tensors.items():
        target, how = rename(name)
        if how == "as stored":
            targets[name] = target
        fused = name in state and len(stored.shape) == 3  # experts that are turned over while loading
        layer = layers.index(target)
        if how == "unknown":
            dense[name] = UNUSED
        elif how == "converted" and not fused:
            dense[name] = "rearranged by transformers while loading"
        elif stored.numel == 0:
            dense[name] = "empty"
        elif len(stored.shape) < 2:
            dense[name] = "not a matrix"
            vectors[target] = name
        elif layer is None:
            dense[name] = _outside(target, model)
        else:
            merged = how == "merged" and not fused
            linear = _classify(name, target, merged, layer, model, downs, hidden, tuple(state[target].shape))
            if isinstance(linear, Dense):
                dense[name] = linear.reason
                lost |= {name} if linear.reason != "router" and target in parameters else set()
            else:
                weights[name] = linear
    embedding, head = _tables(model, targets)
    watches = (*_watches(weights.values(), model), *([Watch(head, table_modules(model)[1])] if head else []))
    return Architecture(
        layers=layers.outputs,
        parts=layers.prefixes,
        weights=weights,
        dense=dense,
        watches=watches,
        downs={watch.name: layers.index(f"{watch.module}.") or 0 for watch in watches if watch.down},
        vectors=vectors,
        targets=targets,
        tied=_tied(model, targets),
        embedding=embedding,
        head=head,
        lost=frozenset(lost),
    )


def _hidden_size(model: PreTrainedModel) -> int:
    """Width of the residual stream: the configuration's, or the embedding's where it has none of that name (BLT)."""
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) else model.get_input_embeddings().get_parameter("weight").shape[1]


def _tied(model: PreTrainedModel, targets: Mapping[str, str]) -> dict[str, str]:
    """Stored tensors that the built model ties to another stored one; its configuration alone does not decide."""
    stored = {target: name for name, target in targets.items()}
    ties: Mapping[str, str] = model.all_tied_weights_keys
    return {stored[tied]: stored[source] for tied, source in ties.items() if tied in stored and source in stored}


def _tables(model: PreTrainedModel, targets: Mapping[str, str]) -> tuple[str, str]:
    """Stored names of embedding and output head."""
    stored = {target: name for name, target in targets.items()}
    embedding, head = (f"{name}.weight" for name in table_modules(model))
    tied = model.all_tied_weights_keys.get(head) == embedding
    one = stored.get(embedding) or stored.get(head, "") if tied else ""
    return stored.get(embedding, one), stored.get(head, one)


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
    merged: bool,
    layer: int,
    model: PreTrainedModel,
    downs: set[str],
    hidden: int,
    shape: tuple[int, ...],
) -> LinearWeight | Dense:
    module_name, _, parameter = target.rpartition(".")
    module = model.get_submodule(module_name)
    if len(shape) == 3 and _holds_experts(module_name, module):
        leaf = module_name.rpartition(".")[2] if parameter == "weight" else parameter
        down = leaf in DOWN_PROJECTIONS and hidden in shape[1:]
        if not merged:
            return LinearWeight(name, LinearKind.FUSED, layer, module_name, parameter, None, down, name)
        index = re.search(r"experts\.(\d+)\.", name)
        if index is None:
            return Dense("expert without a number")
        expert = int(index[1])
        # Projections that are concatenated (gate and up) share their input, so they share the watch.
        watch = name if down else f"{target}[{expert}]"
        return LinearWeight(name, LinearKind.EXPERT, layer, module_name, parameter, expert, down, watch)
    if module_name.rpartition(".")[2] in _ROUTERS or _chooses_experts(model, module_name):
        return Dense("router")
    if _stays_float32(model, target):
        return Dense("kept in float32 by the model")
    if parameter == "weight" and isinstance(module, nn.Linear | Conv1D):
        return LinearWeight(name, _kind(module), layer, module_name, parameter, None, module_name in downs, name)
    return Dense(f"{type(module).__name__} is not a linear layer")


def _holds_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name or "Expert" in type(module).__name__


def _chooses_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether a linear layer has as many outputs as there are experts beside it: a router, whatever its name."""
    outputs = getattr(model.get_submodule(name), "out_features", 0)
    for above in (name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")[0]):
        for child, module in model.get_submodule(above).named_children():
            if "expert" in child and not name.startswith(f"{above}.{child}.") and _experts_in(module) == outputs:
                return True
    return False


def _experts_in(module: nn.Module) -> int:
    """How many experts a module holds: of a list its length, of fused parameters their first dimension."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    return next((parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3), -1)


def _stays_float32(model: PreTrainedModel, target: str) -> bool:
    """Whether the model keeps a parameter in float32, whatever it is loaded as: 16-bit scales would change its type."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if model.config.get_text_config().dtype is torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    return any(re.search(rf"((^|\.){name}($|\.))", target) for name in kept)


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
