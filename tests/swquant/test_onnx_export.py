"""Export to ONNX: the same answers as the checkpoint, a folder that appears whole or not at all, errors that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from conftest import PROMPT, Ran, save_model, tiny_model

import swquant
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.export.onnx import pipeline
from swquant.export.onnx.graph import adapt_config
from swquant.models.loading import build_model
from swquant.models.onnx_model import OnnxModel

pytest.importorskip("onnxruntime")
Cli = Callable[..., Ran]


_PLAIN_MLP = ("opt",)


SETTINGS: dict = {"prompt": PROMPT, "block": "32", "outliers": 0.01}


def compressed_model(architecture: str, folder: Path, **options: object) -> Path:
    """A random model of two layers, as tracing takes seconds for each, with one weight in a hundred in the sidecar."""
    # genai's builder takes every module that is as wide as the vocabulary for the output head, hence 96.
    sizes = {"num_hidden_layers": 2, **({} if architecture in _PLAIN_MLP else {"intermediate_size": 96})}
    save_model(tiny_model(architecture, **sizes), folder / "model")
    return swquant.compress(folder / "model", folder / "out", **{**SETTINGS, **options}).path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path) -> Path:
    """Its ONNX folder. Do not change it."""
    return swquant.export(checkpoint, checkpoint.parent / "onnx").path


@pytest.fixture(scope="session")
def genai(checkpoint: Path) -> Path:
    """The same weights in one step, as genai's builder draws them, for the fast arithmetic."""
    source, folder = checkpoint.parent / "model", checkpoint.parent / "genai"
    onnx_folder: dict = {"format": "onnx", "graph": "genai", "accuracy_level": 4, "lm_head_bits": 8}
    return swquant.compress(source, folder, **onnx_folder, **SETTINGS).path


def torch_model(checkpoint: Path) -> torch.nn.Module:
    """The checkpoint with every weight decoded in float32, as a runtime does."""
    with CompressedCheckpoint(checkpoint, unrounded=True) as opened:
        return build_model(opened, torch.float32)


def check_parity(checkpoint: Path, folder: Path, sequences: int = 2) -> None:
    """Prompts, an empty past and one of some tokens, and twelve greedy tokens through the cache.

    sequences: the builder's attention takes one, where several tokens meet a past.
    """
    reference = torch_model(checkpoint)
    model = OnnxModel.open(folder / "model.onnx", reference.config)
    ids = torch.randint(2, 128, (sequences, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids).logits.numpy()
    tolerance = 1e-4 * np.ptp(expected)
    whole, _ = model.step(ids.numpy(), model.empty_past(sequences))
    assert np.abs(whole - expected).max() < tolerance
    first, past = model.step(ids[:, :4].numpy(), model.empty_past(sequences))
    second, past = model.step(ids[:, 4:8].numpy(), past)
    third, _ = model.step(ids[:, 8:].numpy(), past)
    assert np.abs(np.concatenate([first, second, third], axis=1) - expected).max() < tolerance
    with torch.no_grad():
        greedy = reference.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert model.generate(ids[:1], max_new_tokens=12).tolist() == greedy.tolist()


def test_the_model_gives_the_same_logits_and_tokens(checkpoint: Path, exported: Path) -> None:
    check_parity(checkpoint, exported)


def test_eval_and_generate_run_the_folder(cli: Cli, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    text = " ".join(f"t{41 + 7 * index % 59}" for index in range(60))
    result = swquant.evaluate(exported, text, checkpoint, window=20)
    assert result.windows == 3
    assert result.kl is not None
    assert result.kl < 1e-6
    assert result.top1 == 1.0
    ran = cli("generate", exported, "t5 t9", "--tokens", "8")
    assert (ran.code, ran.out) == (0, cli("generate", checkpoint, "t5 t9", "--tokens", "8").out)
    for words, problem in (
        (("generate", exported, "t5", "--no-restore"), "the outliers are part of the graph"),
        (("detect", exported), "can only be run"),
        (("compress", exported, tmp_path / "again"), "can only be run"),
        (("export", exported, tmp_path / "again"), "already exported"),
    ):
        ran = cli(*words)
        assert (ran.code, problem in ran.err) == (1, True), ran.err


def test_the_builders_graph_at_level_4(checkpoint: Path, genai: Path) -> None:
    manifest = swquant.inspect(genai)
    assert manifest["operators"]["com.microsoft::GroupQueryAttention"] == 2
    assert manifest["operators"]["swquant::LinearNBits"] == 11  # q, k and v in one, gate, up, down, o; the head
    assert manifest["weights"]["lm_head"]["bits"] == 8
    assert json.loads((genai / "genai_config.json").read_text())["model"]["type"] == "llama"
    result = swquant.evaluate(genai, " ".join(f"t{index}" for index in range(3, 90)), checkpoint)
    assert result.kl is not None
    assert result.kl < 1e-3


def test_one_step_says_what_two_would(checkpoint: Path, genai: Path) -> None:
    compressed, manifest = swquant.inspect(checkpoint), swquant.inspect(genai)
    assert manifest["compression"] == {key: compressed[key] for key in ("source", "options")}
    assert manifest["options"]["graph"] == "genai"
    assert manifest["detection"] == compressed["detection"]
    assert not list(genai.rglob("*.safetensors"))
    assert {path.name for path in checkpoint.parent.iterdir()} <= {"model", "out", "onnx", "genai"}


def test_the_plan_of_both_steps_is_shown_and_checked(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("compress", checkpoint.parent / "model", tmp_path / "folder", "--format", "onnx", "--prompt", PROMPT)
    ran = cli(*words, "--lm-head-bits", "8", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert (plan["format"], plan["export"]["lm_head_bits"], plan["export"]["graph"]) == ("onnx", 8, "dynamo")
    assert ran.err == ""
    assert "this would become" in cli(*words, "--dry-run").out
    monkeypatch.chdir(tmp_path)
    default = json.loads(cli(*words[:2], *words[3:], "--dry-run", "--json").out)
    assert default["out"] == "model-w4-b128-onnx"
    for extra, problem in (
        (("--format", "gguf"), "format 'gguf' is not one of: checkpoint, onnx"),
        (("--format", "checkpoint", "--graph", "genai"), "--graph is an option of the export; add --format onnx"),
        (("--accuracy-level", "3"), "--accuracy-level 3 is not one of: 0, 4"),
    ):
        ran = cli(*words, *extra)
        assert (ran.code, problem in ran.err) == (1, True), ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "make_reference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        swquant.compress(checkpoint.parent / "model", tmp_path / "folder", format="onnx", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


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
    assert list(codes.dims) == ([128, 2, 16] if bits == 4 else [128, 64])  # for MatMulNBits, for LinearNBits


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


def test_the_manifest_says_what_was_checked(exported: Path) -> None:
    manifest = swquant.inspect(exported)
    check = manifest["check"]
    assert check["largest_difference"] < 1e-4 < check["without_outliers"]
    assert check["same_tokens"] == check["generated_tokens"] == 16
    assert list(check["providers"]) == ["CPUExecutionProvider"]
    assert manifest["operators"]["swquant::LinearNBits"] == len(manifest["weights"]) == 14
    assert swquant.verify(exported) == []


def test_a_wrong_export_is_not_written(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong scale in the graph, where a wrong layout would make many."""
    graph = onnx_ir.load(exported / "model.onnx")
    name = "model.layers.0.self_attn.v_proj.scales"
    scales = graph.graph.initializers[name].const_value.numpy().copy()
    scales[0, 0] *= 1.5
    graph.graph.initializers[name].const_value = onnx_ir.tensor(scales, name=name)
    monkeypatch.setattr(pipeline, "dynamo_graph", lambda *_: graph)
    with pytest.raises(swquant.SwquantError, match=r"differs from the checkpoint by .* nothing was written"):
        swquant.export(checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_experts_are_refused_with_the_alternative(tmp_path: Path) -> None:
    checkpoint = compressed_model("mixtral", tmp_path, outliers=0.0)
    with pytest.raises(
        swquant.SwquantError, match="expert of a mixture.*serve the checkpoint with transformers or vLLM"
    ):
        swquant.export(checkpoint, tmp_path / "onnx")
    with pytest.raises(swquant.SwquantError, match="expert of a mixture"):
        swquant.compress(tmp_path / "model", tmp_path / "again", prompt=PROMPT, format="onnx")


def test_only_compressed_checkpoints_are_exported(cli: Cli, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    ran = cli("export", checkpoint.parent / "model", tmp_path / "onnx")
    assert (ran.code, "make one first: swquant compress" in ran.err) == (1, True)
    ran = cli("export", checkpoint, exported)
    assert (ran.code, "exists already" in ran.err) == (1, True)
    ran = cli("export", checkpoint, tmp_path / "onnx", "--precision", "fp8")
    assert (ran.code, "--precision fp8 is not one of: fp32" in ran.err) == (1, True)


def test_inspect_shows_nodes_and_check(cli: Cli, exported: Path) -> None:
    ran = cli("inspect", exported)
    assert ran.code == 0
    assert "LinearNBits, 4 bits, block 32" in ran.out
    assert "16 of 16 greedy tokens the same" in " ".join(ran.out.split())
    assert json.loads(cli("inspect", exported, "--json").out)["kind"] == "onnx"
