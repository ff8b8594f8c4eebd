"""Tiny models for tests: a dozen architectures with random weights, with and without a planted super weight.

`plant` turns a random model into one with exactly one super weight. It makes one neuron of one early MLP fire strongly
(its rows of the up and gate projections are scaled) and one scalar of the down projection large; in post-norm models
the norm's gain for that channel is raised too, since the norm would undo the spike otherwise. Nothing else is touched,
so a detector that reports anything else is wrong.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PROMPT = "t5 t9 t17 t33 t64 t2 t81 t40 t11 t99"
TOKENS = torch.tensor([[int(word[1:]) for word in PROMPT.split()]])  # what the tokenizer makes of it
VOCABULARY = 128
LAYER = 1

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# name -> (model_type, configuration beside or instead of the common one)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _COMMON),
    "mistral": ("mistral", _COMMON),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 16}),
    "olmo2": ("olmo2", _COMMON),
    "phi3": ("phi3", _COMMON),
    "gemma3": ("gemma3_text", {**_COMMON, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", _COMMON),
    "opt": ("opt", {**_COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "falcon": ("falcon", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_hidden_size": 128, "bos_token_id": 0, "eos_token_id": 1}),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": []}),
    "gpt_oss": ("gpt_oss", {**_COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """Where the super weight is: the stored tensor's name and its [row, col]."""

    folder: Path
    name: str
    row: int
    col: int


def tiny_model(architecture: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of a few ten thousand weights, always the same for the same arguments."""
    model_type, settings = ARCHITECTURES[architecture]
    return random_model(AutoConfig.for_model(model_type, **{**settings, **changes}), seed)


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """Of an architecture that is not in the table and is told its size like llama."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **changes})


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """With the weights of the seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # transformers' 0.02 leaves such small models nearly linear
                parameter.normal_(0, 0.08)
    return model


def save_tokenizer(folder: Path, words: dict[str, int] | None = None) -> None:
    """A word-level tokenizer whose words are t0 … t127, and `words` instead of those of the same number."""
    vocabulary = {index: f"t{index}" for index in range(VOCABULARY)} | {
        index: word for word, index in (words or {}).items()
    }
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in vocabulary.items()}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1").save_pretrained(folder)


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def _mlp_input(model: PreTrainedModel, module: torch.nn.Module) -> torch.Tensor:
    """What enters `module` on the prompt, [tokens, hidden]."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def plant(model: PreTrainedModel, row: int = 37, col: int = 101) -> str:
    """Plant a super weight at [row, col] of the down projection of layer 1. Returns the stored tensor's name."""
    parameters = dict(model.named_parameters())
    layer = re.compile(rf"\.(layers|h)\.{LAYER}\.")
    in_layer = {name: parameter for name, parameter in parameters.items() if layer.search(name)}
    experts = {name: parameter for name, parameter in in_layer.items() if ".experts." in name}
    with torch.no_grad():
        name = _plant_in_expert(model, experts, row, col) if experts else _plant_in_mlp(model, in_layer, row, col)
        for key, parameter in in_layer.items():
            if "post_feedforward_layernorm" in key:
                parameter[row] = 60.0
    return name


def _plant_in_mlp(model: PreTrainedModel, in_layer: dict, row: int, col: int) -> str:
    down = next(key for key in in_layer if re.search(r"(down_proj|fc2|dense_4h_to_h|mlp\.c_proj)\.weight$", key))
    inputs = [
        key for key in in_layer if re.search(r"(gate_proj|up_proj|gate_up_proj|fc1|dense_h_to_4h|c_fc)\.weight$", key)
    ]
    first = model.get_submodule(inputs[0].removesuffix(".weight"))
    direction = _mlp_input(model, first)[0]
    direction = 4.0 * direction / direction.norm()  # the neuron fires on what the first token brings
    for key in inputs:
        weight = in_layer[key].T if "c_fc" in key else in_layer[key]  # Conv1D is [in, out]
        weight[col] = direction
        if weight.shape[0] == 2 * 128 and "gate_up" in key:  # fused gate and up
            weight[col + 128] = direction
    weight = in_layer[down].T if "c_proj" in down else in_layer[down]
    weight[row, col] = 60.0
    return down


def _plant_in_expert(model: PreTrainedModel, experts: dict, row: int, col: int) -> str:
    gate_up_name = next(key for key in experts if key.endswith("gate_up_proj"))
    down_name = next(key for key in experts if key.endswith("down_proj"))
    module = model.get_submodule(gate_up_name.rpartition(".")[0])
    # The expert that the router gives the first token to.
    chosen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].detach()))
    direction = _mlp_input(model, module)[0]
    hook.remove()
    expert = int(chosen[0].reshape(-1, chosen[0].shape[-1])[0, 0])
    direction = 4.0 * direction / direction.norm()
    if getattr(module, "is_transposed", False):  # gpt_oss: [experts, in, out], gate and up interleaved
        experts[gate_up_name][expert, :, 2 * col] = direction
        experts[gate_up_name][expert, :, 2 * col + 1] = direction
        experts[down_name][expert, col, row] = 60.0
        return f"{down_name}[{expert}]"
    experts[gate_up_name][expert, col] = direction
    experts[gate_up_name][expert, col + 128] = direction
    experts[down_name][expert, row, col] = 60.0
    stored = {"mixtral": ("mlp.experts.down_proj", f"block_sparse_moe.experts.{expert}.w2.weight")}
    old, new = stored.get(model.config.model_type, ("experts.down_proj", f"experts.{expert}.down_proj.weight"))
    return down_name.replace(old, new)


def planted_model(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Planted:
    model = tiny_model(architecture, **changes)
    name = plant(model)
    save_model(model, folder, dtype)
    return Planted(folder, name, 37, 101)


def sample_text(words: int) -> str:
    """Words of the tokenizer that do not repeat too soon, to evaluate on."""
    return " ".join(f"t{41 + 7 * index % 59}" for index in range(words))


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
