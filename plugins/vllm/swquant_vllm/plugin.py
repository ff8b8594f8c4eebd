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
from torch import Tensor
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
from swquant_vllm.sidecar import OUTLIERS, Checkpoint, SidecarError, fetched, open_checkpoint

__all__ = ["CheckedConfig", "check_interface"]

logger = init_logger("vllm.swquant")

WITHOUT = "update swquant-vllm, or set VLLM_PLUGINS= to run without outliers"
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
        if getattr(hf_config, "swquant", None) is not None:
            self.checkpoint = open_checkpoint(fetched(model_name, revision))
            patched = {*self.checkpoint.patched, *self.checkpoint.channels}
            self.names, self.claimed = {name.removesuffix(".weight"): name for name in patched}, set()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.checkpoint is not None:
            self.names = {hf_to_vllm_mapper.map_name(name) or name: stored for name, stored in self.names.items()}

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if self.checkpoint is None:
            return method
        if isinstance(layer, RoutedExperts):
            self._leave_out(self.checkpoint, prefix.removesuffix(".routed_experts"))
        elif isinstance(layer, LinearBase):
            stored = self._stored(prefix)
            self.claimed.update(stored.values())
            loading = _Loading(self, self.checkpoint, stored, prefix)
            if type(method) is CompressedTensorsLinearMethod:
                layer.scheme = PatchedScheme(layer.scheme, loading)
            elif stored and type(method) is UnquantizedLinearMethod:
                return PatchedDense(loading)
            elif stored:
                raise SidecarError(f"{prefix}: nothing can be added to a {type(method).__name__}; {WITHOUT}")
        return method

    def _stored(self, prefix: str) -> dict[Hashable, str]:
        """Shard of a layer as its weight loader names it, None for a whole one -> the patched tensor that it is."""
        parent, _, own = prefix.rpartition(".")
        names: dict[Hashable, str] = {None: prefix}
        for shard, module in enumerate(self.packed_modules_mapping.get(own, ())):
            names[shard] = f"{parent}.{module}"
        names |= {letter: names[shard] for shard, letter in enumerate("qkv") if shard in names}
        return {shard: self.names[name] for shard, name in names.items() if name in self.names}

    def _leave_out(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Experts are one kernel in vLLM, which nothing can be added to: outliers are left out, and that is said."""
        inside = {stored for name, stored in self.names.items() if name.startswith(f"{prefix}.")} - self.claimed
        self.claimed |= inside
        if any({*checkpoint.patched.get(name, ())} - {OUTLIERS} for name in inside):
            raise SidecarError(
                f"{prefix}: vLLM's experts take no trained blocks; serve it with swquant.load, or {WITHOUT}"
            )
        if inside:
            logger.warning("swquant: the outliers of %d weights of the experts in %s are left out", len(inside), prefix)

    def check(self) -> None:
        """Raises SidecarError where patches of the checkpoint belong to no layer: vLLM has other names."""
        lost = set(self.names.values()) - self.claimed
        if get_pp_group().world_size > 1:  # other stages have the layers that this one has nothing of
            here = {_layer(name) for name in self.claimed}
            lost = {name for name in lost if _layer(name) in here}
        if lost:
            raise SidecarError(
                f"{min(lost)}: no layer of vLLM takes its patches, nor of {len(lost) - 1} others; {WITHOUT}"
            )


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`."""
    return name[: found.end()] if (found := _LAYER.match(name)) else name


def _weight(layer: Any) -> Tensor:
    """The parameter with the weights or the codes of a layer, a row for each output."""
    return layer.weight_packed if hasattr(layer, "weight_packed") else layer.weight


class _Loading:
    """What is known of a layer while its weights are loaded. stored: see `CheckedConfig._stored`."""

    def __init__(self, config: CheckedConfig, checkpoint: Checkpoint, stored: dict[Hashable, str], prefix: str) -> None:
        self.check, self.checkpoint, self.stored, self.prefix = config.check, checkpoint, stored, prefix
        self.sizes: dict[Hashable, int] = {}  # shard -> rows of the weight that was loaded into it

    def watched(self, layer: Any, load: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that does what `load` does, and notes what passes through it."""
        self.load = load

        def loader(param: Tensor, loaded: Tensor, *shard: Any, **named: Any) -> Any:
            if param is _weight(layer):
                self.sizes[next(iter((*shard, *named.values())), None)] = loaded.shape[0]
            return load(param, loaded, *shard, **named)

        return loader

    def parts(self, layer: Any, width: int) -> list[Part]:
        """The parts of patched weights that this rank's layer of `width` inputs holds."""
        lost = set(self.stored.values()) - {self.stored.get(shard) for shard in self.sizes}
        if lost:
            raise SidecarError(f"{min(lost)}: vLLM loads no such weight into {self.prefix}; {WITHOUT}")
        parts, axis = [], 1 if isinstance(layer, RowParallelLinear) else 0
        own = (_weight(layer).shape[0], width)[axis]
        for shard in self.stored.keys() & self.sizes.keys():
            whole = (self.sizes[shard], layer.input_size)
            places = [torch.arange(size) for size in whole]
            places[axis] = positions(self._here(layer, own, whole[axis], axis, shard), whole[axis])
            parts.append(Part(self.stored[shard], *places))
        return parts

    def _here(self, layer: Any, own: int, whole: int, axis: int, shard: Hashable) -> Tensor:
        """Which of `whole` rows or columns the layer's own loader puts at each of its `own`, -1 where it puts none."""
        shape = (1, -1) if axis else (-1, 1)
        empty, numbers = torch.full((own,), -1).view(shape), torch.arange(whole).view(shape)
        parameter = ModelWeightParameter(data=empty, input_dim=1, output_dim=0, weight_loader=self.load)
        parameter.tp_rank, parameter.tp_size = layer.tp_rank, layer.tp_size
        self.load(parameter, numbers, *(() if shard is None else (shard,)))
        return parameter.data.flatten()

    def blocks(self, parts: list[Part], decoded: Decode, width: int) -> list[Block]:
        """What is added to the layer's decoded weights."""
        found: list[Block] = []
        for part in parts:
            if patches := [taken(patch, part) for patch in self.checkpoint.patches(part.tensor, part.shape)]:
                found += differences(patches, decoded, width)
        return found

    def kept(self, parts: list[Part]) -> Tensor:
        """The layer's own input channels that stay in float; those of a fused layer together."""
        kept = [part.cols[list(self.checkpoint.kept(part.tensor, part.shape[1]))] for part in parts]
        here = torch.unique(torch.cat(kept))
        return here[here >= 0]


class PatchedScheme(CompressedTensorsScheme):
    """A scheme of vLLM, and after its kernel what the patches add."""

    def __init__(self, scheme: CompressedTensorsScheme, loading: _Loading) -> None:
        self.scheme, self.loading = scheme, loading

    @classmethod
    def get_min_capability(cls) -> int:
        return CompressedTensorsConfig.get_min_capability()

    def create_weights(self, layer: Any, weight_loader: Callable[..., Any], **sizes: Any) -> None:
        self.width, self.dtype = sizes["input_size_per_partition"], sizes["params_dtype"]
        self.scheme.create_weights(layer=layer, weight_loader=self.loading.watched(layer, weight_loader), **sizes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes what is added, then lets the kernel pack the codes its own way."""
        self.loading.check()
        if self.loading.stored:
            with torch.device("cpu"):  # whatever vLLM makes its tensors on
                self._make(layer)
        else:
            layer.scheme = self.scheme
        self.scheme.process_weights_after_loading(layer)

    def _make(self, layer: Any) -> None:
        codes, zero = _weight(layer), getattr(layer, "weight_zero_point", None)
        at = decode(
            codes.data.cpu(), layer.weight_scale.data.cpu(), None if zero is None else zero.data.cpu(), self.width
        )
        parts = self.loading.parts(layer, self.width)
        layer.swquant = modules(self.loading.blocks(parts, at, self.width), self.dtype)
        layer.swquant_columns = None
        if (kept := self.loading.kept(parts)).numel():
            columns = at(torch.arange(codes.shape[0]).unsqueeze(0), kept.unsqueeze(1))
            layer.swquant_columns = Columns(kept, columns.to(self.dtype))
            layer.swquant.append(layer.swquant_columns)
        layer.swquant.to(codes.device)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        seen = x if layer.swquant_columns is None else layer.swquant_columns.hidden(x)
        y = self.scheme.apply_weights(layer, seen, bias)
        for module in layer.swquant:
            module(x, y)
        return y


@register_weight_loader_v2_supported_method
class PatchedDense(UnquantizedLinearMethod):
    """A dense layer, whose own weights the patches change when they are loaded."""

    def __init__(self, loading: _Loading) -> None:
        super().__init__()
        self.loading = loading

    def create_weights(self, layer: Any, *args: Any, weight_loader: Callable[..., Any], **named: Any) -> None:
        super().create_weights(layer, *args, weight_loader=self.loading.watched(layer, weight_loader), **named)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.loading.check()
        weight = layer.weight.data
        width = weight.shape[1]
        with torch.device("cpu"):
            parts = self.loading.parts(layer, width)
            changed = self.loading.blocks(parts, lambda *at: weight[at].float().cpu(), width)
        for block in changed:
            rows, cols = block.rows.clamp(min=0).unsqueeze(2), block.cols.clamp(min=0).unsqueeze(1)
            weight.index_put_((rows, cols), block.values.to(weight), accumulate=True)
        super().process_weights_after_loading(layer)
