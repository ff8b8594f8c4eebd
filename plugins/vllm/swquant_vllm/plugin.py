"""The joints with vLLM: its compressed-tensors config, and the schemes of layers, each wrapped.

Names are vLLM's business and stay so: what it calls a layer comes from `get_quant_method`, what it fuses from its
`packed_modules_mapping`, what it calls stored weights from the mapper that it hands to `apply_vllm_mapper`. So is what
a rank holds: the layer's own weight loader, which cuts fused and parallel weights, is given a column of row numbers,
and what arrives are the numbers of the rows that this rank has.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import ModelWeightParameter

from swquant_vllm.added import Block, Columns, Decode, Part, decode, differences, modules, positions, taken
from swquant_vllm.sidecar import Checkpoint, SidecarError, fetched, open_checkpoint

__all__ = ["CheckedConfig", "check_interface"]

logger = init_logger("vllm.swquant")

_SHARDS: dict[Hashable, int] = {"q": 0, "k": 1, "v": 2}
_LAYER = re.compile(r".*?\.\d+(?=\.)")
# What is overridden or called below, with the parameters that it must have.
_INTERFACE: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (CompressedTensorsConfig.get_quant_method, ("self", "layer", "prefix")),
    (CompressedTensorsConfig.maybe_update_config, ("self", "model_name", "hf_config", "revision")),
    (CompressedTensorsConfig.apply_vllm_mapper, ("self", "hf_to_vllm_mapper")),
    (CompressedTensorsScheme.apply_weights, ("self", "layer", "x", "bias")),
    (CompressedTensorsScheme.process_weights_after_loading, ("self", "layer")),
    (UnquantizedLinearMethod.process_weights_after_loading, ("self", "layer")),
)


def check_interface() -> None:
    """Raise TypeError where a function of vLLM takes something else than is given to it."""
    for function, names in _INTERFACE:
        if tuple(inspect.signature(function).parameters) != names:
            raise TypeError(f"{function.__qualname__} does not take {', '.join(names[1:])}")


class CheckedConfig(CompressedTensorsConfig):
    """compressed-tensors, and what a swquant checkpoint has beside it. Other checkpoints see no difference."""

    checkpoint: Checkpoint | None = None
    # vLLM's name of a weight -> its name in the checkpoint; those that a layer of this process answers for.
    names: dict[str, str]
    claimed: set[str]

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        super().maybe_update_config(model_name, hf_config, revision)
        if getattr(hf_config, "swquant", None) is None:
            return
        self.checkpoint = open_checkpoint(fetched(model_name, revision))
        patched = {*self.checkpoint.patched, *self.checkpoint.channels}
        self.names, self.claimed = {name.removesuffix(".weight"): name for name in patched}, set()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.checkpoint is not None:
            mapped = {name: hf_to_vllm_mapper._map_name(name) for name in self.names}
            self.names = {new or name: self.names[name] for name, new in mapped.items()}

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if self.checkpoint is None:
            return method
        if isinstance(layer, RoutedExperts):
            self._leave_out(prefix.removesuffix(".routed_experts"))
        elif isinstance(layer, LinearBase):
            parent, _, own = prefix.rpartition(".")
            fused = [f"{parent}.{module}" for module in self.packed_modules_mapping.get(own, ())]
            shards = {**dict(enumerate(fused)), None: prefix}
            stored = {shard: self.names[name] for shard, name in shards.items() if name in self.names}
            self.claimed.update(stored.values())
            patches = _Patches(self, stored, prefix)
            if type(method) is CompressedTensorsLinearMethod:
                layer.scheme = PatchedScheme(layer.scheme, patches)
            elif type(method) is UnquantizedLinearMethod:
                return PatchedDense(patches) if stored else method
            elif stored:
                raise SidecarError(
                    f"{prefix}: patches cannot be added to {type(method).__name__}; set VLLM_PLUGINS= to run without"
                )
        return method

    def _leave_out(self, prefix: str) -> None:
        """Experts are one kernel in vLLM, which nothing can be added to: outliers are left out, and that is said."""
        assert self.checkpoint is not None
        inside = {stored for name, stored in self.names.items() if name.startswith(f"{prefix}.")} - self.claimed
        self.claimed |= inside
        if any(sets != ("outliers",) for sets in (self.checkpoint.patched.get(name, ("outliers",)) for name in inside)):
            raise SidecarError(
                f"{prefix}: trained blocks cannot be added to the experts of vLLM; serve it with swquant.load"
            )
        if inside:
            logger.warning("swquant: the outliers of %d experts' weights in %s are left out", len(inside), prefix)

    def check(self) -> None:
        """Raises SidecarError where patches of the checkpoint belong to no layer: vLLM has other names."""
        lost = set(self.names.values()) - self.claimed
        if get_pp_group().world_size > 1:  # other stages have the layers that this one has nothing of
            here = {_layer(name) for name in self.claimed}
            lost = {name for name in lost if _layer(name) in here}
        if lost:
            raise SidecarError(
                f"{min(lost)}: no layer of this model takes its patches ({len(lost)} such weights); vLLM names or fuses them in "
                "a way that is not known: update swquant-vllm, or set VLLM_PLUGINS= to run without outliers"
            )


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""
    found = _LAYER.match(name)
    return found[0] if found else name


class _Patches:
    """What a layer is given beside its weights. stored: index in a fused layer (None: the whole layer) -> tensor."""

    def __init__(self, config: CheckedConfig, stored: dict[int | None, str], prefix: str) -> None:
        self.config, self.stored, self.prefix = config, stored, prefix
        self.sizes: dict[Hashable, int] = {}  # shard as vLLM names it -> rows of the stored weight

    def watched(self, layer: nn.Module, load: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that does what `load` does, and notes which weights pass through it."""
        self.load = load

        def loader(param: Tensor, loaded: Tensor, *shard: Any, **named: Any) -> Any:
            if param is _weight(layer):
                self.sizes[next(iter((*shard, *named.values())), None)] = loaded.shape[0]
            return load(param, loaded, *shard, **named)

        return loader

    def held(self, layer: nn.Module, width: int) -> list[tuple[str, tuple[int, int], Part]]:
        """(tensor, shape [out, in], the part of it that this rank holds) of each stored weight with patches."""
        columns = torch.arange(width)
        whole = layer.input_size
        if isinstance(layer, RowParallelLinear):
            columns = self._numbers(layer, torch.full((1, width), -1), torch.arange(whole).view(1, -1), None)
        found = []
        for shard, size in self.sizes.items():
            name = self.stored.get(_SHARDS.get(shard, shard))
            if name is None:
                continue
            empty = torch.full((_weight(layer).shape[0], 1), -1)
            rows = torch.arange(size)
            if not isinstance(layer, RowParallelLinear):
                rows = self._numbers(layer, empty, rows.view(-1, 1), shard)
            found.append((name, (size, whole), Part(positions(rows, size), positions(columns, whole))))
        lost = set(self.stored.values()) - {name for name, _, _ in found}
        if lost:
            raise SidecarError(f"{min(lost)}: vLLM loads no such weight into {self.prefix}; update swquant-vllm")
        return found

    def _numbers(self, layer: nn.Module, empty: Tensor, numbers: Tensor, shard: Any) -> Tensor:
        probe = ModelWeightParameter(data=empty, input_dim=1, output_dim=0, weight_loader=self.load)
        probe.tp_rank, probe.tp_size = layer.tp_rank, layer.tp_size
        self.load(probe, numbers, *(() if shard is None else (shard,)))
        return probe.data.flatten()

    def blocks(self, held: list[tuple[str, tuple[int, int], Part]], decoded: Decode, width: int) -> list[Block]:
        """What is added to the layer's decoded weights."""
        found = []
        for name, shape, part in held:
            if patches := [taken(patch, part) for patch in self.config.checkpoint.patches(name, shape)]:
                found += differences(patches, decoded, width)
        return found


def _weight(layer: nn.Module) -> Tensor:
    """The parameter with the weights or the codes of a layer."""
    packed = getattr(layer, "weight_packed", None)
    return layer.weight if packed is None else packed


class PatchedScheme(CompressedTensorsScheme):
    """A scheme of vLLM, and after its kernel what the patches add."""

    def __init__(self, scheme: CompressedTensorsScheme, patches: _Patches) -> None:
        self.scheme, self.patches = scheme, patches
        self.columns: Columns | None = None

    @classmethod
    def get_min_capability(cls) -> int:
        return CompressedTensorsConfig.get_min_capability()

    def create_weights(self, layer: nn.Module, weight_loader: Callable[..., Any], **sizes: Any) -> None:
        self.width, self.dtype = sizes["input_size_per_partition"], sizes["params_dtype"]
        self.scheme.create_weights(layer=layer, weight_loader=self.patches.watched(layer, weight_loader), **sizes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Makes what is added, then lets the kernel pack the codes its own way."""
        self.patches.config.check()
        if self.patches.stored:
            self._make(layer)
        else:
            layer.scheme = self.scheme
        self.scheme.process_weights_after_loading(layer)

    def _make(self, layer: nn.Module) -> None:
        weight = _weight(layer)
        zero = getattr(layer, "weight_zero_point", None)
        at = decode(
            *(None if part is None else part.data.cpu() for part in (weight, layer.weight_scale, zero)), self.width
        )
        held = self.patches.held(layer, self.width)
        layer.swquant = modules(self.patches.blocks(held, at, self.width), self.dtype, weight.device)
        kept = self._kept(held)
        if kept.numel():
            columns = at(torch.arange(weight.shape[0]).unsqueeze(0), kept.unsqueeze(1))
            layer.swquant_columns = Columns(kept, columns.to(self.dtype)).to(weight.device)

    def _kept(self, held: list[tuple[str, tuple[int, int], Part]]) -> Tensor:
        """The layer's own input channels that stay in float; those of a fused layer together."""
        checkpoint = self.patches.config.checkpoint
        places = [part.cols[list(checkpoint.kept(name, shape[1]))] for name, shape, part in held]
        kept = torch.unique(torch.cat(places))
        return kept[kept >= 0]

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        columns = getattr(layer, "swquant_columns", None)
        y = self.scheme.apply_weights(layer, x if columns is None else columns.hidden(x), bias)
        if columns is not None:
            columns(x, y)
        for module in layer.swquant:
            module(x, y)
        return y


@register_weight_loader_v2_supported_method
class PatchedDense(UnquantizedLinearMethod):
    """A dense layer, whose own weights the patches change when they are loaded."""

    def __init__(self, patches: _Patches) -> None:
        super().__init__()
        self.patches = patches

    def create_weights(self, layer: nn.Module, *args: Any, weight_loader: Callable[..., Any], **named: Any) -> None:
        super().create_weights(layer, *args, weight_loader=self.patches.watched(layer, weight_loader), **named)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.patches.config.check()
        weight = layer.weight.data
        held = self.patches.held(layer, weight.shape[1])
        changed = self.patches.blocks(held, lambda rows, cols: weight[rows, cols].float(), weight.shape[1])
        for block in changed:
            rows, cols = block.rows.clamp(min=0).unsqueeze(2), block.cols.clamp(min=0).unsqueeze(1)
            weight.index_put_((rows, cols), block.values.to(weight.dtype), accumulate=True)
        super().process_weights_after_loading(layer)
