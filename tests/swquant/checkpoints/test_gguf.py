"""GGUF files: what is read equals what llama.cpp was given and what transformers reads; damage is one message."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.tiny_models import VOCABULARY, plant, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant
from swquant.checkpoints.open import open_checkpoint

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


def write_gguf(path: Path, kind: str, *, extra: str | None = None) -> dict[str, torch.Tensor]:
    """A tiny llama with a super weight as a GGUF file. Returns its weights before they were encoded."""
    model = tiny_model("llama")
    plant(model)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(index) for index in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permuted(values, heads)
        encoding = KINDS[kind] if values.ndim == 2 else KINDS["F32"]
        writer.add_tensor(stored_name(name), gguf.quantize(values, encoding), raw_dtype=encoding)
    if extra:
        writer.add_tensor(extra, np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, "F16")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_transformers_reads_and_what_was_written(tmp_path: Path, kind: str) -> None:
    state = write_gguf(tmp_path / "m.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    error = {"F32": 0.0, "F16": 1e-3, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == theirs.keys() == state.keys()
        for name, original in state.items():
            read = checkpoint.read(name)
            assert (read.dtype, tuple(read.shape)) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
            assert torch.equal(read, theirs[name]), name
            assert (read - original).abs().max() <= error * original.abs().max(), name


def test_the_tokenizer_is_the_files_own(f16: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(f16.parent, gguf_file=f16.name)
    with open_checkpoint(f16) as checkpoint:
        assert checkpoint.tokenizer()(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]


def test_a_gguf_file_is_compressed_into_a_folder_that_stands_alone(f16: Path, tmp_path: Path) -> None:
    result = swquant.compress(f16, tmp_path / "out", prompt=PROMPT)
    assert swquant.verify(result.path) == []
    (weight,) = result.manifest["detection"]["super_weights"]
    assert (weight["name"], weight["row"], weight["col"]) == ("model.layers.1.mlp.down_proj.weight", 37, 101)
    assert result.manifest["source"]["kind"] == "gguf"
    model = swquant.load(result.path)
    assert model.dtype is torch.bfloat16
    assert model.model.layers[1].mlp.down_proj.weight[37, 101] == 60.0
    stock = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto")
    tokens = AutoTokenizer.from_pretrained(result.path)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, swquant.load(result.path, restore=False)(tokens).logits)


def test_the_default_name_drops_the_suffix(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert swquant.compress(f16, prompt=PROMPT).path == Path("tiny-w4-b128")


def test_a_gguf_file_cannot_be_probed_from_disk(f16: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="a gguf model must fit in memory; convert it to safetensors"):
        swquant.detect(f16, PROMPT, low_memory=True)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F16", extra="blk.0.mystery.weight")
    with pytest.raises(swquant.SwquantError, match=r"first blk\.0\.mystery\.weight\); convert it"):
        swquant.detect(tmp_path / "m.gguf", PROMPT)


GARBAGE = {
    "no GGUF": (b"PK\x03\x04 a zip file", "does not begin with GGUF"),
    "empty": (b"", "does not begin with GGUF"),
    "only the magic": (b"GGUF", "not a readable GGUF file"),
    "noise": (b"GGUF" + bytes(range(256)) * 40, "not a readable GGUF file"),
    "a billion keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 10**9), "not a readable GGUF file"),
    "a long string": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"abc", "not a readable GGUF file"),
    "no keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "not a readable GGUF file"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_one_message(tmp_path: Path, kind: str) -> None:
    data, message = GARBAGE[kind]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(swquant.SwquantError, match=f"m.gguf: .*{message}") as caught:
        swquant.detect(tmp_path / "m.gguf", PROMPT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.99])
def test_a_cut_file_is_one_message(f16: Path, tmp_path: Path, part: float) -> None:
    data = f16.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(part * len(data))])
    with pytest.raises(swquant.SwquantError, match=r"m\.gguf: not a readable GGUF file .*fetch it again") as caught:
        swquant.detect(tmp_path / "m.gguf", PROMPT)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_message(f16: Path, tmp_path: Path) -> None:
    data = f16.read_bytes()
    assert data.count(b"llama") > 1
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"lemma"))
    with pytest.raises(swquant.SwquantError, match="not a readable GGUF file"):
        swquant.detect(tmp_path / "m.gguf", PROMPT)
