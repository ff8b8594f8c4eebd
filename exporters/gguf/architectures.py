"""What llama.cpp calls an architecture: its name, the numbers of it in the header, and what its graph wants of tensors.

A row per `model_type` of a configuration. The numbers are those of llama.cpp's converter (convert_hf_to_gguf.py); the
tests run that and compare key by key. Unknown types are refused: a graph that is nearly right answers nearly right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from torch import Tensor

from exporters.errors import SwquantError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

Config = Mapping[str, Any]
Numbers = Callable[["gguf.GGUFWriter", Config], None]


@dataclass(frozen=True)
class Architecture:
    """arch: of gguf's tables of names. permuted: whether the rows of q and k are reordered for llama.cpp's rotary
    embedding. norm_shift: what is added to the gain of every norm, since transformers adds it when it runs. numbers:
    writes the header's; raises SwquantError for those that llama.cpp's graph has otherwise built in. derived: tensor ->
    values of what has no weight in the checkpoint. activation: of the MLP, which the graph has built in."""

    arch: gguf.MODEL_ARCH
    permuted: bool = False
    norm_shift: float = 0.0
    numbers: tuple[Numbers, ...] = ()
    derived: Callable[[Config], dict[str, Tensor]] = field(default=lambda _: {})
    activation: str = "silu"

    @property
    def name(self) -> str:
        """As `general.architecture` says it."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    def write(self, writer: gguf.GGUFWriter, config: Config) -> None:
        """The numbers of the header. Raises SwquantError for what llama.cpp's graph cannot do, KeyError for what is
        missing."""
        activation = config.get("hidden_activation") or config.get("hidden_act") or self.activation
        if activation not in (self.activation, *_SAME.get(self.activation, ())):
            raise SwquantError(f"its MLP has {activation}, llama.cpp's graph of {self.name} {self.activation}")
        for numbers in self.numbers:
            numbers(writer, config)

    def unheld(self, config: Config) -> tuple[str, ...]:
        """What a user should know that the file does not say."""
        window = config.get("sliding_window")
        if window and config.get("use_sliding_window", True) and self.arch in _WHOLE_TEXT:
            return (f"the sliding window of {window} tokens: llama.cpp's graph of {self.name} looks at the whole text",)
        return ()


def architecture_of(model: str, config: Config) -> Architecture:
    """The row of a configuration. Raises SwquantError for a model that it does not describe."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SwquantError(f"{model}: GGUF files of {kind!r} are not known here; known are {known}")
    return ARCHITECTURES[kind]


def _rope(config: Config) -> dict[str, Any]:
    """Of the layers that see the whole text."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters = dict(parameters.get("full_attention", parameters))
    parameters.setdefault("rope_theta", config.get("rope_theta"))
    parameters.setdefault("rope_type", parameters.get("type"))
    for name in ("original_max_position_embeddings", "partial_rotary_factor"):
        if config.get(name) is not None:
            parameters.setdefault(name, config[name])
    return parameters


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _heads(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _rotary(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = _rope(config)
    kind = rope["rope_type"] or "default"
    if kind not in ("default", "llama3", "linear", "yarn", "longrope", "su"):
        raise SwquantError(
            f"the rotary embedding is of type {kind!r}, which is not known here; known are linear, yarn, …"
        )
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("longrope", "su"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    if rope["rope_theta"] is not None:
        writer.add_rope_freq_base(rope["rope_theta"])
    sliding = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    local = sliding.get("rope_theta", config.get("rope_local_base_freq"))
    if local is not None:
        writer.add_rope_freq_base_swa(local)


def _llama(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(_head_dim(config))


def _experts(writer: gguf.GGUFWriter, config: Config) -> None:
    count = config.get("num_local_experts") or config.get("num_experts")
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size") is not None:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _qwen3_moe(_: gguf.GGUFWriter, config: Config) -> None:
    if not config.get("norm_topk_prob"):
        raise SwquantError("norm_topk_prob is off, and llama.cpp's graph of qwen3moe has it on")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise SwquantError("some layers have no experts, and llama.cpp's graph of qwen3moe has them in all")


def _smollm3(_: gguf.GGUFWriter, config: Config) -> None:
    layers = config.get("no_rope_layers")
    if layers is not None and list(layers) != [int((layer + 1) % 4 != 0) for layer in range(len(layers))]:
        raise SwquantError("no_rope_layers is not every fourth, which is what llama.cpp's graph of smollm3 has")


def _attention_scale(config: Config, layers_of_27b: int) -> None:
    """Gemma's: llama.cpp knows the models, not the number."""
    expected = _head_dim(config)
    if config["num_hidden_layers"] == layers_of_27b:
        expected = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] != expected:
        raise SwquantError(
            f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and llama.cpp's graph takes {expected} for these layers"
        )


def _gemma2(writer: gguf.GGUFWriter, config: Config) -> None:
    _attention_scale(config, 46)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: gguf.GGUFWriter, config: Config) -> None:
    _attention_scale(config, 62)
    if config.get("attn_logit_softcapping") is not None:
        raise SwquantError("attn_logit_softcapping is set, which llama.cpp's graph of Gemma 3 does not know")
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    kinds = config.get("layer_types")
    if kinds is None or "sliding_attention" in kinds:
        expected = [
            "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(len(kinds or ()))
        ]
        if kinds is not None and list(kinds) != expected:
            raise SwquantError(
                "layer_types are not five sliding to one full, which is what llama.cpp's graph of Gemma 3 has"
            )
        writer.add_sliding_window(config["sliding_window"])


def _phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    rope, longest = _rope(config), config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or longest
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if rope.get("long_factor"):
        scale = longest / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _rotated(config: Config) -> int:
    share = _rope(config).get("partial_rotary_factor") or 1.0
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


def _phi3_factors(config: Config) -> dict[str, Tensor]:
    rope = _rope(config)
    if not rope.get("long_factor"):
        return {}
    half = _rotated(config) // 2
    factors = {name: torch.tensor(rope[f"{name}_factor"], dtype=torch.float32) for name in ("long", "short")}
    if odd := next((name for name, values in factors.items() if len(values) != half), None):
        raise SwquantError(
            f"{odd}_factor of the rotary embedding has {len(factors[odd])} numbers, half a head has {half}"
        )
    return {f"rope_factors_{name}.weight": values for name, values in factors.items()}


def _llama_factors(config: Config) -> dict[str, Tensor]:
    """What each frequency of a head is divided by: the scaling of Llama 3.1 and later."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    size = _head_dim(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    waves = 2 * math.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    original = rope["original_max_position_embeddings"]
    factors = torch.where(waves < original / high, 1.0, torch.where(waves > original / low, float(factor), between))
    return {"rope_freqs.weight": factors.to(torch.float32)}


_PLAIN = (_sizes, _heads, _rotary)
_M = gguf.MODEL_ARCH
_LLAMA = Architecture(_M.LLAMA, permuted=True, numbers=(*_PLAIN, _llama, _experts), derived=_llama_factors)
_GELU = "gelu_pytorch_tanh"
_SAME = {_GELU: ("gelu_new", "gelu")}  # llama.cpp has one gelu, and Gemma's old configurations name the other
_WHOLE_TEXT = (_M.LLAMA, _M.QWEN2, _M.QWEN3, _M.QWEN3MOE)
_QWEN2 = Architecture(_M.QWEN2, numbers=_PLAIN)

# model_type of a configuration -> the architecture
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": Architecture(_M.QWEN3, numbers=_PLAIN),
    "qwen3_moe": Architecture(_M.QWEN3MOE, numbers=(*_PLAIN, _experts, _qwen3_moe)),
    "gemma2": Architecture(_M.GEMMA2, norm_shift=1.0, numbers=(_sizes, _heads, _gemma2), activation=_GELU),
    "gemma3_text": Architecture(_M.GEMMA3, norm_shift=1.0, numbers=(*_PLAIN, _gemma3), activation=_GELU),
    "phi3": Architecture(_M.PHI3, numbers=(_sizes, _rotary, _phi3), derived=_phi3_factors),
    "olmo2": Architecture(_M.OLMO2, numbers=_PLAIN),
    "smollm3": Architecture(_M.SMOLLM3, permuted=True, numbers=(*_PLAIN, _llama, _smollm3), derived=_llama_factors),
}
