"""Every language model of the installed transformers, tiny and random: default configurations, shrunk by the names of
their keys, and a table of what some architectures need beside that.

`MODEL_TYPES` are all that the causal and the image-text Auto classes know. `build` raises for the few that transformers
itself cannot build of their default configuration, or not without another library.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL)
MODEL_TYPES = CAUSAL + IMAGE_TEXT

VOCABULARY, LAYERS, LARGEST = 128, 4, 12_000_000
_TOKENS = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11, 6]])


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


# Key of a configuration -> its size in a tiny model.
SIZES: dict[str, int] = {
    **_all("vocab_size n_vocab vocab_size_per_layer_input", VOCABULARY),
    **_all(
        "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim projection_dim d_embed emb_dim "
        "embedding_dim hidden_dim text_hidden_size out_hidden_size output_dim lm_hidden_size proj_dim dim_model "
        "cross_attention_hidden_size lru_width input_embedding_size attention_hidden_size projector_hidden_size "
        "moe_hidden_size adapter_in_dim adapter_out_dim adapter_input_size",
        64,
    ),
    **_all(
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff d_inner dff ffn_hidden_size mlp_dim dim_ff "
        "block_ff_dim feed_forward_size ffn_hidden_dim intermediate_size_mlp shared_intermediate_size "
        "feed_forward_hidden_size projection_intermediate_size",
        128,
    ),
    **_all(
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size moe_ffn_hidden_size sliding_window",
        64,
    ),
    **_all(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_encoder_layers "
        "num_decoder_layers encoder_num_hidden_layers",
        LAYERS,
    ),
    **_all(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads num_lightning_heads "
        "linear_num_value_heads linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts "
        "num_routed_experts",
        4,
    ),
    **_all(
        "num_key_value_heads num_kv_heads n_kv_heads kv_n_heads multi_query_group_num num_query_groups "
        "linear_num_key_heads n_mamba_heads num_codebooks index_n_heads num_experts_per_tok num_experts_per_token moe_topk "
        "moe_k top_k_experts experts_per_token",
        2,
    ),
    **_all(
        "head_dim d_kv attention_head_dim kv_channels v_head_dim qk_rope_head_dim qk_nope_head_dim dim_head "
        "linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim attn_head_dim mamba_d_head mamba_d_state "
        "hidden_size_per_layer_input mamba_head_dim ssm_state_size state_size",
        16,
    ),
    **_all("q_lora_rank kv_lora_rank o_lora_rank index_head_dim", 32),
    **_all("n_group topk_group num_expert_group n_limited_groups mamba_n_groups mamba_ngroups", 1),
    **_all(
        "max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx max_seq_length seq_length "
        "max_target_positions max_source_positions",
        128,
    ),
    **_all("mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank index_topk", 8),
    "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "sep_token_id": 1,
    "image_size": 28, "max_img_size": 28, "patch_size": 14, "num_channels": 3,
}  # fmt: skip

# Encoders that are language models only when they are told to be decoders.
_DECODERS = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "reformer",
        "prophetnet",
    ]
)
_FLOAT32 = ("xlnet",)  # whose own code fails with weights in bfloat16
_ROPE = ("rope_parameters", "rope_scaling")
_NOT_SIZES = ("architectures", "_name_or_path", "dtype", "is_encoder_decoder")
Change = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


def _multimodal_rope(*sections: int, **more: Any) -> Change:
    def change(settings: dict[str, Any]) -> dict[str, Any]:
        text = settings.get("text_config", settings)
        base = {"rope_type": "default", "rope_theta": 10000.0, **(text.get("rope_parameters") or {})}
        text |= {"rope_parameters": {**base, "mrope_section": list(sections)}, **more}
        return settings

    return change


def _heads_of_16(settings: dict[str, Any]) -> dict[str, Any]:
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict) and "num_attention_heads" in part:
            part["head_dim"] = 16
    return settings


_THREE_SECTIONS = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_GEMMA3N = {
    "num_kv_shared_layers": 0, "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
_ONE_IMAGE_TOKEN = {"<image>": 120, "<|extra_200|>": 121}
_SMALL_VQ = {
    "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32,
    "num_embeddings": 16,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32, "indexer_compress_ratio": 4,
}  # fmt: skip
# model type -> what it needs beside smaller sizes.
CHANGES: dict[str, Change] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 32, "encoder_hash_byte_group_size": [2],
        "encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64},
        "global_config": {"encoder_cross_output_size": 128},
    },
    "chameleon": {"vocabulary_map": _ONE_IMAGE_TOKEN, "vq_config": _SMALL_VQ},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": _THREE_SECTIONS},
    "cohere_compass": {"text_config": {"rope_parameters": _THREE_SECTIONS}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2, "n_routed_experts": 4,
        },
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots3_note_text": {"head_dim": 40},
    "dots3_note": {"text_config": {"head_dim": 40}},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": _ONE_IMAGE_TOKEN, "vq_config": {"base_channels": 32}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 32},
    "florence2": {
        "vision_config": {
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4],
        },
    },
    "gemma3n_text": _GEMMA3N,
    "gemma3n": {"text_config": _GEMMA3N},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _heads_of_16),
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 1]], "spatial_target_layers": [0, 1, 2, 3]},
    "janus": {"vq_config": _SMALL_VQ},
    "muse_spark": {"audio_config": {"hidden_sizes": [32, 32, 64]}},
    "granitemoe_swa": {"shared_intermediate_size": 128},
    "granitemoeshared": {"shared_intermediate_size": 128},
    "llama4_text": {"moe_layers": [0]},
    "nemotron_h_omni": {"vision_hidden_size": 64},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
            "pixel_shuffle_ratio": 0.5,
        },
        "text_config": {"num_experts_per_tok": 1, "moe_layers": [0]},
    },
    "longcat_flash": {"qk_head_dim": 32, "zero_expert_num": 2, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 32},
    "mistral4": {"head_dim": 32, "qk_head_dim": 32},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh", "local", "lsh"], "num_hashes": 1,
        "attention_head_size": 16,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 32, "shape_embed_dim": 32, "pronunciation_vocab_size": 40, "shape_vocab_size": 40,
    },
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8,
        "mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
        "kv_channels": 16, "adapter_rank": 16, "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_kpool": 4}},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm46v", "glm4v", "glm_ocr", "glmga"),
        _multimodal_rope(2, 3, 3),
    ),
    "ernie4_5_vl_moe": _multimodal_rope(3, 3, 2),
    "hunyuan_vl": _multimodal_rope(2, 3, 3, head_dim=16),
    "glm4v_moe": _multimodal_rope(1, 1, 2),
}  # fmt: skip


_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers")


def _shrunk(settings: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    """The settings with the sizes of a tiny model of so many layers. Nothing and none stay what they are."""
    out = dict(settings)
    depths = {value for key, value in settings.items() if key in _DEPTHS and isinstance(value, int)}
    for key, value in settings.items():
        if isinstance(value, bool) or value is None or not isinstance(key, str) or key == "per_layer_config":
            continue
        if isinstance(value, dict) and key in _ROPE:
            out[key] = {**value, "mrope_section": [2, 3, 3]} if "mrope_section" in value else value
        elif isinstance(value, dict) and key not in ("label2id", "id2label"):  # a tower's depth is not the decoder's
            out[key] = _shrunk(value, LAYERS - 1 if key in ("vision_config", "audio_config") else LAYERS)
        elif key in SIZES and isinstance(value, int) and (value or key.endswith("_id")):
            out[key] = layers if key in _DEPTHS else SIZES[key]
        elif key.endswith("_token_id") and isinstance(value, int):
            out[key] = 100 + sum(map(ord, key)) % 20
        elif key.endswith(("_token_id", "_token_ids")) and isinstance(value, list | tuple):
            out[key] = 1 if key == "eos_token_id" else [1]
        elif isinstance(value, list | tuple) and len(value) > layers and len(value) in depths:
            numbers = list(value) == list(range(len(value)))
            out[key] = list(range(layers)) if numbers else [value[index] for index in _kept(list(value), layers)]
    if out.get("kv_lora_rank") and settings.get("num_key_value_heads") == settings.get("num_attention_heads"):
        out["num_key_value_heads"] = out.get("num_attention_heads")
    if "qk_head_dim" in out and out.get("qk_nope_head_dim"):
        out["qk_head_dim"] = out["qk_nope_head_dim"] + out["qk_rope_head_dim"]
    if settings.get("per_layer_config"):
        out["per_layer_config"] = _of_each_layer(settings, out, layers)
    return out


def _of_each_layer(settings: dict[str, Any], shrunk: dict[str, Any], layers: int) -> dict[str, dict[str, Any]]:
    """What some layers have for themselves, of those that are kept, as many times the usual size as it was."""
    kinds = settings.get("layer_types") or settings.get("mlp_layer_types") or list(range(layers))
    own = {int(layer): values for layer, values in settings["per_layer_config"].items()}
    return {
        f"{number:02}": {
            key: max(1, shrunk[key] * value // settings[key]) if key in SIZES else value
            for key, value in own[old].items()
        }
        for number, old in enumerate(_kept(kinds, layers))
        if old in own
    }


def _kept(values: list[Any], layers: int) -> list[int]:
    """So many of the indices of the values, with every kind of value among them if there is room."""
    kinds = [index for index, value in enumerate(values) if value not in values[:index]]
    missing = [index for index in kinds if index >= layers][: layers - 1]
    return [*range(layers - len(missing)), *missing]


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(settings[key], value) if isinstance(value, dict) and isinstance(settings.get(key), dict) else value
            for key, value in changes.items()}  # fmt: skip
    return {**settings, **both}


def config_of(model_type: str) -> Any:
    """The tiny configuration of an architecture."""
    kind = CONFIG_MAPPING[model_type]
    settings = _shrunk(kind().to_dict())
    for name in _NOT_SIZES:
        settings.pop(name, None)
    change = CHANGES.get(model_type, {})
    settings = change(settings) if callable(change) else _merged(settings, change)
    settings.pop("add_cross_attention", None)
    if "is_decoder" in settings or model_type in _DECODERS:
        settings["is_decoder"] = True
    return kind.from_dict(settings)


def build(model_type: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A random model, always the same, in bfloat16 if nobody says otherwise and its code can. Raises whatever
    transformers raises, and ValueError for what stays too large."""
    names = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    kind, config = getattr(transformers, names[model_type]), config_of(model_type)
    with torch.device("meta"):
        count = kind._from_config(copy.deepcopy(config)).num_parameters()
    if count > LARGEST:
        raise ValueError(f"{count:,} weights are too many for a tiny model")
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            elif not bool(torch.isfinite(parameter).all()):
                parameter.zero_()
    return model.to(dtype or (torch.float32 if model_type in _FLOAT32 else torch.bfloat16))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model and a tokenizer of words."""
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "<pad>", "<unk>", "Apple", "Inc", ".", "is", "a", "worldwide", "tech", "company"]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """float32 [tokens, vocabulary] of nine tokens."""
    inputs, takes = {"input_ids": _TOKENS}, inspect.signature(model.forward).parameters
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _TOKENS
    if "bbox" in takes:  # where on its page a word stands
        inputs["bbox"] = torch.zeros(*_TOKENS.shape, 4)
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits[0].float()
