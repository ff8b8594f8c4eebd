"""A mixture as stock Qwen2-MoE, which transformers and vLLM load without us: what that can express, and under what
names.

    pr_moe      y = c0 · MLP(x) + c1 · E(x)              c = softmax(coefficient(x))
    Qwen2-MoE   y = sigmoid(g(x)) · MLP(x) + E(x)        the MLP is its shared expert

Untrained both are the MLP, exactly: E(x) is 0, c0 and the sigmoid are 0.5, and the MLP's down projection is doubled. A
trained mixture is another function there, since its experts have a coefficient. So options and plan refuse that and all
else that the architecture has no place for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swquant.checkpoints.base import Stored
from swquant.moe.plan import MoePlan
from swquant.output.dense import Written

__all__ = ["stock_config", "stock_tensors"]

# What all of them say of themselves, whether their file does or leaves it to a default of the family.
_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "attention_dropout", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip


def stock_config(plan: MoePlan, dtype: str) -> dict[str, Any]:
    """What config.json will hold."""
    known = plan.checkpoint.config.to_dict()
    first, with_mixture = plan.mixtures[0], {mixture.layer for mixture in plan.mixtures}
    return {
        **{key: known[key] for key in _KEYS if known.get(key) is not None},
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "dtype": dtype,
        "qkv_bias": any(target.endswith("q_proj.bias") for target in plan.targets.values()),
        "num_experts": first.experts,
        "num_experts_per_tok": plan.options.top,
        "norm_topk_prob": plan.options.top > 1,
        "moe_intermediate_size": first.size,
        "shared_expert_intermediate_size": first.neurons,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(known["num_hidden_layers"]) if layer not in with_mixture],
    }


def stock_tensors(plan: MoePlan, tensors: Mapping[str, Written]) -> dict[str, Written]:
    """The tensors of a pr_moe under Qwen2-MoE's names."""
    made: dict[str, Written] = {}
    for name, item in tensors.items():
        target = name.removeprefix("model.")
        module = next((mixture.module for mixture in plan.mixtures if target.startswith(f"{mixture.module}.")), "")
        local = target.removeprefix(f"{module}.") if module else ""
        if local == "coefficient.weight":
            shape = (1, item.form.shape[1])
            made[f"{module}.shared_expert_gate.weight"] = Written(Stored(item.form.dtype, shape), _zeros(shape))
        elif local.startswith("mlp."):
            made[f"{module}.shared_expert.{local.removeprefix('mlp.')}"] = item
        elif local != "coefficient.bias":
            made[target] = item
    return made


def _zeros(shape: tuple[int, ...]) -> Any:
    return lambda: torch.zeros(shape)
