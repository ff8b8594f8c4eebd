"""The exported graph gives the logits and the tokens of the checkpoint: in every family, at any bits, on every path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.exported import SETTINGS, check_parity, compressed_model
from support.tiny_models import save_model, tiny_model

import swquant
from swquant.export.onnx.graph import adapt_config
from swquant.models.onnx_model import OnnxModel

pytest.importorskip("onnxruntime")


def test_the_model_gives_the_same_logits_and_tokens(checkpoint: Path, exported: Path) -> None:
    check_parity(checkpoint, exported)


def test_the_builders_graph_at_level_4(checkpoint: Path, genai: Path) -> None:
    manifest = swquant.inspect(genai)
    assert manifest["operators"]["com.microsoft::GroupQueryAttention"] == 2
    assert manifest["operators"]["swquant::LinearNBits"] == 11  # q, k and v in one, gate, up, down, o; the head
    assert manifest["weights"]["lm_head"]["bits"] == 8
    assert json.loads((genai / "genai_config.json").read_text())["model"]["type"] == "llama"
    result = swquant.evaluate(genai, " ".join(f"t{index}" for index in range(3, 90)), checkpoint)
    assert result.kl is not None
    assert result.kl < 1e-3


def test_onnxruntime_genai_runs_the_builders_graph(genai: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(genai))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=14, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([5, 9])
    while not generator.is_done():
        generator.generate_next_token()
    ours = OnnxModel.open(genai / "model.onnx", None).generate(torch.tensor([[5, 9]]), max_new_tokens=12)
    theirs = list(generator.get_sequence(0))
    assert theirs == ours[0, : len(theirs)].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3"])
def test_the_builders_graph_gives_the_same_logits_and_tokens(architecture: str, tmp_path: Path) -> None:
    checkpoint = compressed_model(architecture, tmp_path)
    check_parity(checkpoint, swquant.export(checkpoint, tmp_path / "onnx", graph="genai").path, sequences=1)


def test_the_builder_is_told_of_nested_rotary_parameters(tmp_path: Path) -> None:
    """Gemma 3's, as transformers 5 writes them; others stay as they are."""
    kinds = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    flat = {"rope_type": "default", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    for before, after in ((kinds, {**kinds, **flat}), ({"rope_theta": 1e4}, {"rope_theta": 1e4}), (None, None)):
        (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": before}))
        adapt_config(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == {"rope_parameters": after}


@pytest.mark.slow
def test_parts_of_attention_that_differ_are_not_fused(tmp_path: Path) -> None:
    checkpoint = compressed_model("llama", tmp_path, dense=["v_proj"])
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph="genai").path
    check_parity(checkpoint, folder, sequences=1)
    assert swquant.inspect(folder)["operators"]["MatMul"] == 3  # v of both layers, lm_head


@pytest.mark.parametrize(
    ("graph", "bits"),
    [
        ("genai", 4),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("genai", 8), ("dynamo", 4), ("dynamo", 8))),
    ],
)
def test_a_tied_embedding_shares_the_heads_codes(graph: str, bits: int, tmp_path: Path) -> None:
    save_model(
        tiny_model("llama", num_hidden_layers=1, intermediate_size=96, tie_word_embeddings=True), tmp_path / "model"
    )
    options: dict = {"graph": graph, "lm_head_bits": bits, "format": "onnx"}
    folder = swquant.compress(tmp_path / "model", tmp_path / "onnx", **options, **SETTINGS).path
    check = swquant.inspect(folder)["check"]
    assert check["largest_difference"] < 1e-4
    assert check["same_tokens"] == check["generated_tokens"]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    floats = [sorted(item.dims) for item in model.graph.initializer if item.data_type != onnx.TensorProto.UINT8]
    assert [64, 128] not in floats
    (codes,) = (item for item in model.graph.initializer if item.name.endswith("lm_head.codes"))
    assert list(codes.dims) == [128, 64 * bits // 8]  # at 4 bits it has offsets, which LinearNBits alone takes


def test_embeddings_are_scaled_as_the_model_does(tmp_path: Path) -> None:
    """By the root of 96, which the builder rounds to 9.8."""
    save_model(tiny_model("gemma3", num_hidden_layers=1, hidden_size=96, intermediate_size=192), tmp_path / "model")
    checkpoint = swquant.compress(tmp_path / "model", tmp_path / "out", **SETTINGS).path
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph="genai").path
    assert swquant.inspect(folder)["check"]["largest_difference"] < 1e-5
    model = onnx.load(folder / "model.onnx")
    (scale,) = (item for item in model.graph.initializer if item.name == "model.embed_tokens.scale")
    assert onnx.numpy_helper.to_array(scale) == np.sqrt(np.float32(96))


@pytest.mark.slow
@pytest.mark.parametrize(("graph", "architecture"), [("dynamo", "llama"), ("genai", "llama"), ("genai", "gemma3")])
def test_half_precision(graph: str, architecture: str, tmp_path: Path) -> None:
    if graph == "genai":
        pytest.importorskip("onnxruntime_genai")
    checkpoint = compressed_model(architecture, tmp_path)
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph=graph, precision="fp16", lm_head_bits=8).path
    model = OnnxModel.open(folder / "model.onnx", None)
    assert {array.dtype for array in model.empty_past(1)} == {np.dtype(np.float16)}
    assert swquant.inspect(folder)["check"]["largest_difference"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "olmo2", "phi3", "gemma3", "gpt_neox", "opt"])
def test_other_families_do_too(architecture: str, tmp_path: Path) -> None:
    checkpoint = compressed_model(architecture, tmp_path)
    check_parity(checkpoint, swquant.export(checkpoint, tmp_path / "onnx").path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"bits": 8}, {"bits": 2, "block": "channel"}, {"symmetric": False}, {"block": "24", "dense": ["o_proj"]}, {"bits": 5, "outliers": 0.0, "symmetric": False}],
    ids=str,
)  # fmt: skip
def test_other_bits_and_blocks_do_too(options: dict, tmp_path: Path) -> None:
    checkpoint = compressed_model("llama", tmp_path, **options)
    check_parity(checkpoint, swquant.export(checkpoint, tmp_path / "onnx").path)


def test_linears_become_nodes_with_the_names_of_their_modules(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "LinearNBits"]
    assert len(nodes) == 14
    assert all(node.domain == "swquant" for node in nodes)
    assert [function.name for function in model.functions] == ["LinearNBits"]
    assert nodes[0].input[1] == "model.layers.0.self_attn.q_proj.codes"
    matrices = [list(item.dims) for item in model.graph.initializer if item.data_type == 1 and len(item.dims) == 2]
    assert sorted(dims for dims in matrices if dims[1] > 4) == [
        [64, 128],
        [128, 64],
    ]  # no float copy: embedding and lm_head
    assert {value.name for value in model.graph.input} >= {"input_ids", "attention_mask", "past_key_values.0.key"}
    assert [dim.dim_param for dim in model.graph.input[1].type.tensor_type.shape.dim] == ["batch", "total_sequence"]
