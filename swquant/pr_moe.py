"""Pyramid-residual mixtures of experts over any decoder: the architecture, and nothing of how one is made.

    y = c0 * MLP(x) + c1 * E(x)        c = softmax(coefficient(x)),  E(x) = sum over the `top` chosen experts of w *
    E_e(x)

DeepSpeed-MoE (arXiv:2201.05596): the fixed MLP does the common work and one chosen expert corrects it (residual); later
layers have more experts (pyramid). Without the residual, y = E(x). The weights w are the chosen gates, made to sum to
1; of a single one that leaves the gradient alone. Gates and coefficients are computed in float32.

No architecture of transformers has another number of experts in every layer, so this one has a model type of its own:
stock transformers and vLLM refuse it by name and never take it for a dense model. The file imports nothing of
swquant, for it lies beside the weights of every mixture: `trust_remote_code=True` loads one where swquant is not
installed. Where it is, `swquant.load` needs no such trust, and `import swquant.pr_moe; swquant.pr_moe.register()`
tells the Auto classes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

__all__ = [
    "AUTO_MAP",
    "CODE",
    "Mixture",
    "PrMoeConfig",
    "PrMoeForCausalLM",
    "mixtures_of",
    "narrowed",
    "parts_of",
    "register",
]

CODE = "modeling_pr_moe.py"  # what this file is called beside the weights
AUTO_MAP = {"AutoConfig": "modeling_pr_moe.PrMoeConfig", "AutoModelForCausalLM": "modeling_pr_moe.PrMoeForCausalLM"}


class PrMoeConfig(PreTrainedConfig):
    """text_config: of the dense decoder. mixtures: of every layer that has one, `module` (the MLP's path in the
    decoder), `down` (its down projection), `experts` (how many) and `size` (neurons of each). top: experts that a
    token is given to. capacity: while training, tokens that an expert takes, as a multiple of an even share; None
    takes all."""

    model_type = "pr_moe"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: Any = None,
        mixtures: Any = (),
        top: int = 1,
        residual: bool = True,
        capacity: float | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.mixtures = [dict(item) for item in mixtures]
        self.top, self.residual, self.capacity = top, residual, capacity
        kwargs.setdefault("tie_word_embeddings", bool(getattr(text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)


def parts_of(mlp: nn.Module, down: str) -> dict[str, int]:
    """Linear layer of an MLP -> how often its outputs repeat the neurons: 1, or 2 where gate and up are one layer; 0
    for the down projection, whose inputs they are. Raises ValueError for an MLP that is not made like that."""
    neurons = _features(mlp.get_submodule(down))[1]
    parts = {}
    for name, module in mlp.named_modules():
        if name == down:
            parts[name] = 0
        elif isinstance(module, nn.Linear | Conv1D):
            repeats, rest = divmod(_features(module)[0], neurons)
            if rest or repeats not in (1, 2):
                raise ValueError(f"{name} has {_features(module)[0]} outputs for {neurons} neurons")
            parts[name] = repeats
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"{name or 'the MLP itself'} is a {type(module).__name__} with weights")
    return parts


def _features(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def narrowed(mlp: nn.Module, down: str, size: int) -> nn.Module:
    """A copy of an MLP with `size` neurons, its weights random where that is another number."""
    made = copy.deepcopy(mlp)
    for name, repeats in parts_of(mlp, down).items():
        layer = made.get_submodule(name)
        outputs, inputs = _features(layer)
        new_outputs, new_inputs = (outputs, size) if repeats == 0 else (repeats * size, inputs)
        if (new_outputs, new_inputs) == (outputs, inputs):
            continue
        weight = layer.get_parameter("weight")
        shape = (new_inputs, new_outputs) if isinstance(layer, Conv1D) else (new_outputs, new_inputs)
        layer.weight = nn.Parameter(0.02 * torch.randn_like(weight.new_empty(shape)))
        bias = getattr(layer, "bias", None)
        if bias is not None:
            layer.bias = nn.Parameter(bias.new_zeros(new_outputs))
        named = ("nf", "nx") if isinstance(layer, Conv1D) else ("out_features", "in_features")
        for attribute, value in zip(named, (new_outputs, new_inputs), strict=True):
            setattr(layer, attribute, value)
    return made


class Mixture(nn.Module):
    """In the place of an MLP. recorded: whether `routed` (int64 [experts], tokens given to each), `dropped` (of these,
    the tokens beyond the capacity) and `used` (float32 [experts] each: the mean gate of every expert, which has a
    gradient, and how often it is a token's first choice, which the load-balancing loss is made of) are kept of the last
    pass."""

    def __init__(self, mlp: nn.Module, down: str, experts: int, size: int, config: PrMoeConfig) -> None:
        super().__init__()
        hidden = _features(mlp.get_submodule(down))[0]
        self.top, self.capacity = min(config.top, experts), config.capacity
        self.mlp = mlp if config.residual else None
        self.experts = nn.ModuleList(narrowed(mlp, down, size) for _ in range(experts))
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.coefficient = nn.Linear(hidden, 2) if config.residual else None
        self.recorded = False
        self.routed: Tensor | None = None
        self.used: tuple[Tensor, Tensor] | None = None
        self.dropped = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[…, hidden] -> the same shape."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gates = _in_float32(self.gate, x).softmax(dim=-1)
        weights, chosen = gates.topk(self.top, dim=-1)
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total.detach() if self.top == 1 else total)
        if self.training and self.capacity is not None:
            weights = weights * self._within_capacity(chosen, self.capacity)
        if self.recorded:
            self._record(gates, chosen, weights)
        mixed = self._mixed(x, weights, chosen)
        if self.mlp is not None and self.coefficient is not None:
            share = _in_float32(self.coefficient, x).softmax(dim=-1)[:, 1:].to(x.dtype)
            # c0 * MLP + c1 * E, and exactly the MLP where both are equal.
            fixed = self.mlp(x)
            mixed = fixed + share * (mixed - fixed)
        return mixed.reshape(hidden_states.shape)

    def _mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """sum of weights[t, k] * E_chosen[t, k](x[t]): each expert sees its own tokens, or, in a graph that is being
        exported, where the numbers of these are not known, all of them."""
        mixed = torch.zeros_like(x)
        exporting = torch.compiler.is_exporting()
        for number, expert in enumerate(self.experts):
            if exporting:
                share = (weights * (chosen == number)).sum(dim=-1, keepdim=True)
                mixed = mixed + share.to(x.dtype) * expert(x)
                continue
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                share = weights[tokens, places].unsqueeze(-1).to(x.dtype)
                mixed = mixed.index_add(0, tokens, share * expert(x[tokens]))
        return mixed

    def _within_capacity(self, chosen: Tensor, capacity: float) -> Tensor:
        """bool [tokens, top]: whether the expert still has a place for the token. First choices come first, then
        earlier tokens."""
        tokens, experts = len(chosen), len(self.experts)
        places = -int(-(capacity * tokens * self.top) // experts)  # rounded up
        asked = nn.functional.one_hot(chosen.T.reshape(-1), experts)
        before = (asked.cumsum(dim=0) - 1).gather(1, chosen.T.reshape(-1, 1))
        return (before < places).view(self.top, tokens).T

    def _record(self, gates: Tensor, chosen: Tensor, weights: Tensor) -> None:
        experts = len(self.experts)
        first = nn.functional.one_hot(chosen[:, 0], experts).to(gates.dtype)
        self.used = gates.mean(dim=0), first.mean(dim=0)
        self.routed = torch.bincount(chosen.reshape(-1), minlength=experts)
        self.dropped = int((weights == 0).sum())


def _in_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return nn.functional.linear(x.float(), linear.weight.float(), bias)


def mixtures_of(model: nn.Module) -> dict[str, Mixture]:
    """Name -> mixture, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


class PrMoeForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of transformers with mixtures in the place of some of its MLPs."""

    config_class = PrMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PrMoeConfig) -> None:
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        for item in config.mixtures:
            parent, _, leaf = item["module"].rpartition(".")
            holder = self.model.get_submodule(parent)
            mlp = getattr(holder, leaf)
            setattr(holder, leaf, Mixture(mlp, item["down"], item["experts"], item["size"], config))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the decoder."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Those of the decoder."""
        return self.model.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The decoder without its head."""
        return self.model.get_decoder()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the decoder's."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def register() -> None:
    """Make the Auto classes of transformers know mixtures."""
    AutoConfig.register(PrMoeConfig.model_type, PrMoeConfig, exist_ok=True)
    AutoModelForCausalLM.register(PrMoeConfig, PrMoeForCausalLM, exist_ok=True)
