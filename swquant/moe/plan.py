"""The plan of a mixture: which MLPs become mixtures, what each is made of, and what that costs. Nothing is written.

An MLP is known by its structure: the module that holds the layer's down projection, with nothing beside linear layers
whose outputs are its neurons. No family is named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.models.architecture import Architecture, LinearKind, describe
from swquant.models.converted import as_built
from swquant.models.memory import available_memory
from swquant.models.stock import empty_model
from swquant.moe.options import MoeOptions
from swquant.pr_moe import PrMoeConfig, parts_of
from swquant.units import human_bytes

__all__ = ["MixturePlan", "MoePlan", "make_plan", "refuse_composite"]

_FAMILIES = ("llama", "mistral", "qwen2")  # whose decoder is Qwen2-MoE's, the mixture aside


@dataclass(frozen=True)
class MixturePlan:
    """module: the MLP's path in the decoder. down: its down projection, in it. neurons: of the MLP; size: of an expert.
    parts: linear layer of the MLP -> how often its outputs repeat the neurons (see `pr_moe.parts_of`). transposed:
    whether its weights are [in, out]. weights: of the MLP; expert_weights: of one expert."""

    layer: int
    module: str
    down: str
    experts: int
    neurons: int
    size: int
    hidden: int
    parts: dict[str, int]
    transposed: bool
    weights: int
    expert_weights: int


@dataclass(frozen=True)
class MoePlan:
    """checkpoint: the dense model as it is built. targets: stored name -> parameter. weights: of the dense model."""

    checkpoint: Checkpoint
    options: MoeOptions
    mixtures: tuple[MixturePlan, ...]
    targets: dict[str, str]
    weights: int

    def _extra(self, experts: dict[int, int]) -> int:
        rows, biases = (1, 0) if self.options.stock else (2, 2)  # of what weighs the fixed MLP
        heads = sum(
            mixture.hidden * mixture.experts + (rows * mixture.hidden + biases) * self.options.residual
            for mixture in self.mixtures
        )
        replaced = 0 if self.options.residual else sum(mixture.weights for mixture in self.mixtures)
        return heads - replaced + sum(experts[m.layer] * m.expert_weights for m in self.mixtures)

    @property
    def total(self) -> int:
        """Weights of the mixture."""
        return self.weights + self._extra({mixture.layer: mixture.experts for mixture in self.mixtures})

    @property
    def active(self) -> int:
        """Weights that a token meets."""
        return self.weights + self._extra(dict.fromkeys((m.layer for m in self.mixtures), self.options.top))

    @property
    def nbytes(self) -> int:
        """Bytes of OUT's weights, about: those added have the dtype of the dense ones."""
        stored = [self.checkpoint.tensors[name] for name in self.targets]
        size = sum(self.checkpoint.dense_dtype(form).itemsize * form.numel for form in stored)
        return size * self.total // max(self.weights, 1)

    def config(self, dtype: str) -> dict[str, Any]:
        """What config.json will hold."""
        text = {key: value for key, value in self.checkpoint.raw_config.items() if key != "auto_map"}
        text.pop("torch_dtype", None)
        text["dtype"] = dtype
        mixtures = [
            {"layer": m.layer, "module": m.module, "down": m.down, "experts": m.experts, "size": m.size}
            for m in self.mixtures
        ]
        tied = bool(getattr(self.checkpoint.config, "tie_word_embeddings", False))
        return {
            "model_type": PrMoeConfig.model_type,
            "architectures": ["PrMoeForCausalLM"],
            "dtype": dtype,
            "tie_word_embeddings": tied,
            "top": self.options.top,
            "residual": self.options.residual,
            "capacity": None,
            "mixtures": mixtures,
            "text_config": text,
        }


def refuse_composite(checkpoint: Checkpoint, verb: str) -> None:
    """Raise SwquantError for a model of text and images: its layers are not all of its layers."""
    if checkpoint.config.get_text_config() is not checkpoint.config:
        raise SwquantError(f"{checkpoint.name}: a model of several parts; {verb} takes the text model alone")


def make_plan(checkpoint: Checkpoint, options: MoeOptions) -> MoePlan:
    """Plan the mixtures of a dense model. Raises SwquantError where a layer has no MLP that can be one, or the mixture
    does not fit into memory."""
    if checkpoint.is_compressed:
        raise SwquantError(f"{checkpoint.name}: compressed; make the mixture of the original, then compress that")
    if isinstance(checkpoint.config, PrMoeConfig):
        raise SwquantError(f"{checkpoint.name}: a mixture already; start from the dense model")
    refuse_composite(checkpoint, "moe")
    model = empty_model(checkpoint)
    checkpoint = as_built(checkpoint, model)
    architecture = describe(checkpoint, model)
    counts = options.experts_of(len(architecture.layers))
    mixtures = tuple(
        _mixture(checkpoint.name, model, architecture, layer, experts, options) for layer, experts in counts.items()
    )
    targets = {name: target for name, target in architecture.targets.items() if name in checkpoint.tensors}
    if options.stock:
        _check_stock(checkpoint, targets.values())
    weights = sum(checkpoint.tensors[name].numel for name in targets)
    plan = MoePlan(checkpoint, options, mixtures, targets, weights)
    _check_memory(plan)
    return plan


def _check_stock(checkpoint: Checkpoint, targets: Iterable[str]) -> None:
    """Raise SwquantError for a decoder that is none of Qwen2-MoE's kind. targets: its parameters."""
    kind = checkpoint.config.model_type
    if kind not in _FAMILIES:
        raise SwquantError(
            f"{checkpoint.name}: --as qwen2_moe takes decoders of {', '.join(_FAMILIES)}, this is {kind}; leave it out"
        )
    if kind == "mistral" and checkpoint.config.sliding_window is not None:
        raise SwquantError(f"{checkpoint.name}: --as qwen2_moe has no window in every layer, as this has; leave it out")
    biases = (target for target in targets if target.endswith(".bias") and not re.search(r"\.[qkv]_proj\.", target))
    if odd := next(biases, None):
        raise SwquantError(f"{checkpoint.name}: --as qwen2_moe has no place for {odd}; leave it out")


def _check_memory(plan: MoePlan) -> None:
    """Raise SwquantError unless dense model and mixture can be held against each other, in float32."""
    needed, free = 4 * (plan.weights + plan.total), available_memory()
    if needed > free:
        raise SwquantError(
            f"{plan.checkpoint.name}: the mixture would have {plan.total:,} weights; comparing it with the dense model takes "
            f"{human_bytes(needed)} of memory, {human_bytes(free)} are free; name fewer --experts, or a smaller --expert-size"
        )


def _mixture(
    name: str, model: PreTrainedModel, architecture: Architecture, layer: int, experts: int, options: MoeOptions
) -> MixturePlan:
    """The mixture of one layer. Raises SwquantError where its MLP cannot become one."""
    where = f"{name}: layer {layer}"
    weights_here = [weight for weight in architecture.weights.values() if weight.layer == layer]
    if any(weight.kind in (LinearKind.EXPERT, LinearKind.FUSED) for weight in weights_here):
        raise SwquantError(f"{where} has experts already; moe takes dense models")
    downs = {weight.module for weight in weights_here if weight.down}
    if len(downs) != 1:
        raise SwquantError(f"{where} has {len(downs)} down projections, not one, so no plain MLP; moe cannot take it")
    (full,) = downs
    module, _, down = full.rpartition(".")
    if module == architecture.layers[layer]:
        raise SwquantError(f"{where} has its MLP's weights in the layer itself ({down}), not in a module of its own")
    mlp = model.get_submodule(module)
    try:
        parts = parts_of(mlp, down)
    except ValueError as error:
        raise SwquantError(f"{where}: {module} is no plain MLP ({error})") from None
    transposed = isinstance(mlp.get_submodule(down), Conv1D)
    shape = mlp.get_submodule(down).get_parameter("weight").shape
    rows, columns = shape[::-1] if transposed else shape
    size = columns if options.expert_size is None else options.expert_size
    if size > columns:
        raise SwquantError(
            f"--expert-size {size}: the MLP of layer {layer} has {columns} neurons; give at most so many"
        )
    weights = sum(parameter.numel() for parameter in mlp.parameters())
    biases = sum(p.numel() for n, p in mlp.named_parameters() if n == f"{down}.bias")
    return MixturePlan(
        layer, module, down, experts, columns, size, rows, parts, transposed, weights,
        (weights - biases) * size // columns + biases,
    )  # fmt: skip
