"""Tiny models that a GGUF file can hold: byte-level tokens, rows of 256 weights, what llama.cpp has built in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

PROMPT = "a bad cat had been fed"
_SPECIAL = ("<|begin|>", "<|end|>", "<unk>")

_COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
_MOE = {
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}

# name -> (model_type, what differs). All experts answer, so that rounding never changes which do.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-heads": ("llama", {"head_dim": 32, "attention_bias": True}),
    "llama-3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 6}),
    "phi3": ("phi3", {"original_max_position_embeddings": 128}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "mlp_only_layers": []}),
}


def save_byte_level(folder: Path) -> None:
    """A byte-level BPE tokenizer with a few merges and special tokens, as GPT-2 has one."""
    vocabulary = {token: number for number, token in enumerate(_SPECIAL)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = [(first, second) for first in "abcdefg" for second in "hijklmno"]
    vocabulary |= {"".join(pair): len(vocabulary) + number for number, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end, unknown = _SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token=unknown)
    made.chat_template = "{{ messages[0]['content'] }}"
    made.save_pretrained(folder)


def save_sentencepiece(folder: Path) -> None:
    """A tokenizer of SentencePiece's kind: BPE over characters, bytes for the rest, a space in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh"]
    merges = [("a", "b"), ("\u2581", "ab"), ("c", "d"), ("ab", "cd"), ("a", "bcd")]
    pieces += [first + second for first, second in merges[:3]] + ["abcd"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges[:4], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def gguf_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model, always the same; its norms are no ones, so that what is added to them shows."""
    kind, changes = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_COMMON, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    return model


def save_gguf_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write it with a tokenizer. Returns the model."""
    model = gguf_model(name).to(dtype)
    model.save_pretrained(folder)
    save_byte_level(folder)
    return model
