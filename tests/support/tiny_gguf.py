"""Tiny GGUF files for tests, as llama.cpp's converter writes them: one whole, or with one thing odd about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from support.tiny_models import VOCABULARY, plant, tiny_model

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [*SPECIAL, "\u2581", "t", *(f"\u2581t{index}" for index in range(VOCABULARY - 16)), *"0123456789", "\u2581t"]
PROMPT = "t0 t4 t12 t28 t59 t76 t35"  # the ids 5, 9, 17, … for which the super weight was planted


def stored_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    layer, _, local = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[local]}.{suffix}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them: the two halves of every head interleaved."""
    out, inputs = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(index) for index in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    path: Path,
    kind: str = "F16",
    *,
    extra: dict[str, np.ndarray] | None = None,
    header: Callable[[gguf.GGUFWriter], object] = lambda _: None,
    vocabulary: bool = True,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    tensors: slice = slice(None),
) -> dict[str, torch.Tensor]:
    """A tiny llama with a super weight as a GGUF file. Returns its weights before they were encoded.

    extra: tensors beside its own. header: adds keys. tensors: which of them this file of several holds.
    """
    model = tiny_model("llama")
    plant(model)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    if vocabulary:
        _add_vocabulary(writer)
    header(writer)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in list(state.items())[tensors]:
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)
        encoding = KINDS[kind] if values.ndim == 2 else KINDS["F32"]
        writer.add_tensor(stored_name(name), gguf.quantize(values, encoding), raw_dtype=encoding)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
