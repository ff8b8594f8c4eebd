"""The embedding and the output head as codes: what stock transformers, an independent decoder and we make of them.

Where stock transformers cannot hold them it has to stop with an error: a checkpoint that it loads with a random
embedding, told in a warning, is the one thing that may not come out.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import Cli, document, one_line
from support.plain_decoder import decoded
from support.tiny_models import PROMPT, TOKENS, read_config, sample_text, save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from calibrationless import Group, dequantize, quantize
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.config import checkpoint_config
from swquant.compress.evidence import evidence_for
from swquant.compress.loaders import loader_table
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import prepare

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HOW: dict[str, Any] = {"prompt": PROMPT, "preset": "fast", "block": "32"}
# name -> (architecture, changes); two layers each.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3", {}),
    "gpt2": ("gpt2", {"n_layer": 2}),
    "opt": ("opt", {}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    layers = {"num_hidden_layers": 2}
    return {
        name: save_model(tiny_model(kind, **(layers if kind != "gpt2" else {}), **changes), root / name, torch.bfloat16)
        for name, (kind, changes) in MODELS.items()
    }


def tables(out: Path) -> dict[str, int]:
    """Stored name -> bits of what is no linear weight of a decoder layer."""
    records = swquant.inspect(out)["tensors"]
    layer = re.compile(r"\.(layers|h)\.\d+\.")
    return {name: record["bits"] for name, record in records.items() if "bits" in record and not layer.search(name)}


def check_ours(out: Path) -> torch.Tensor:
    """What we decode is what the independent decoder does, to the bit. Returns our logits."""
    model, plain = swquant.load(out, restore=False), decoded(out)
    read = {name: value for name, value in model.named_parameters() if name in plain}
    assert len(read) > 10
    assert all(torch.equal(value, plain[name]) for name, value in read.items())
    assert swquant.verify(out) == []
    with torch.no_grad():
        return model(TOKENS).logits


def check_stock(out: Path) -> None:
    """Stock transformers loads all of it, and computes what we do."""
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, device_map="cpu")
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    ours = check_ours(out)
    with torch.no_grad():
        assert torch.equal(stock(TOKENS).logits, ours)
    assert swquant.verify(out, loads=True) == []


# --- what stock transformers reads


@pytest.mark.parametrize(
    ("model", "given", "bits"),
    [
        ("untied", {"lm_head_bits": 8}, {HEAD: 8}),
        ("tied", {"embedding_bits": 4}, {EMBEDDING: 4}),
        ("tied", {"lm_head_bits": 4, "offsets": "float"}, {EMBEDDING: 4}),
        ("gemma3", {"embedding_bits": 4, "lm_head_bits": 4, "symmetric": False}, {EMBEDDING: 4}),
        pytest.param("gpt2", {"embedding_bits": 4}, {"transformer.wte.weight": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stock_transformers_reads_it(
    model: str, given: dict[str, Any], bits: dict[str, int], models: dict[str, Path], tmp_path: Path
) -> None:
    out = swquant.compress(models[model], tmp_path / "out", **HOW, **given).path
    assert tables(out) == bits
    assert swquant.inspect(out)["loaders"]["transformers"].startswith("yes")
    check_stock(out)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_stock_transformers_reads_it_in_every_family(model: str, models: dict[str, Path], tmp_path: Path) -> None:
    """One number of bits for all weights, and with it one scheme; a head with bits of its own."""
    one: list[dict[str, Any]] = [{"embedding_bits": 4, "lm_head_bits": 4}, {"embedding_bits": 8, "bits": 8}]
    one.append({"embedding_bits": 4, "block": "channel"})
    if model != "mixtral":
        one += [{"embedding_bits": 4, "symmetric": False}, {"embedding_bits": 4, "offsets": "float"}]
    if model in ("untied", "opt", "mixtral"):
        one += [{"lm_head_bits": 8}, {"lm_head_bits": 4, "block": "channel"}]
    for number, given in enumerate(one):
        check_stock(swquant.compress(models[model], tmp_path / str(number), **{**HOW, **given}).path)


# --- and what it does not


@pytest.mark.parametrize(
    ("model", "given", "bits"),
    [
        ("tied", {"embedding_bits": 8}, {EMBEDDING: 8}),
        ("untied", {"embedding_bits": 8, "lm_head_bits": 4}, {EMBEDDING: 8, HEAD: 4}),
        pytest.param("opt", {"embedding_bits": 8}, {"model.decoder.embed_tokens.weight": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_stock_transformers_cannot_hold_it_refuses(
    model: str, given: dict[str, Any], bits: dict[str, int], models: dict[str, Path], tmp_path: Path
) -> None:
    out = swquant.compress(models[model], tmp_path / "out", **HOW, **given).path
    assert tables(out) == bits
    manifest = swquant.inspect(out)
    said = "no: its modules hold no packed embedding, and it decodes only weights that share one scheme, not int"
    assert manifest["loaders"]["transformers"].startswith(said)
    assert any(note.startswith("stock transformers refuses to load it") for note in manifest["notes"])
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        AutoModelForCausalLM.from_pretrained(out)
    (problem,) = swquant.verify(out, loads=True)
    assert problem.endswith("as its manifest says; use swquant.load, or import swquant.hf")
    ours = check_ours(out)
    importlib.import_module("swquant.hf")  # taken back by the fixture of all tests
    known, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    with torch.no_grad():
        assert torch.equal(known(TOKENS).logits, ours)


def test_a_tied_table_is_stored_once(models: dict[str, Path], tmp_path: Path) -> None:
    """And takes the bytes of its codes and scales, as the plan foretells."""
    given = {**HOW, "lm_head_bits": 8}
    planned = swquant.plan(models["tied"], **given).prepared.plan
    out = swquant.compress(models["tied"], tmp_path / "out", **given).path
    (shard,) = out.glob("*.safetensors")
    parts = {name: part for name, part in load_file(shard).items() if "layers" not in name}
    stem = EMBEDDING.removesuffix("weight")
    assert set(parts) == {f"{stem}weight_packed", f"{stem}weight_scale", f"{stem}weight_shape", "model.norm.weight"}
    assert parts[f"{stem}weight_packed"].shape == (128, 16)
    (table,) = planned.tables
    assert (table.name, table.table, table.outliers) == (EMBEDDING, "embedding and output head", 0)
    assert table.nbytes == swquant.inspect(out)["tensors"][EMBEDDING]["bytes"] == 128 * 64 + 128 * 2 * 2 + 16
    loaded = swquant.load(out)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert read_config(out)["quantization_config"]["ignore"] == ["lm_head"]


def test_a_stored_copy_of_a_tied_table_is_not_written(models: dict[str, Path], tmp_path: Path) -> None:
    """And one that differs is a table of its own."""
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=2)
    folder = save_model(model, tmp_path / "copy")
    state = load_file(folder / "model.safetensors")
    save_file({**state, HEAD: state[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    plan = swquant.plan(folder, **HOW, lm_head_bits=4).prepared.plan
    assert (dict(plan.left_out), [table.name for table in plan.tables]) == (
        {HEAD: "tied to the embedding"},
        [EMBEDDING],
    )
    save_file({**state, HEAD: state[EMBEDDING] * 2}, folder / "model.safetensors", {"format": "pt"})
    plan = swquant.plan(folder, **HOW, lm_head_bits=4).prepared.plan
    assert [(table.name, table.table) for table in plan.tables] == [(HEAD, "output head")]


# --- how they are rounded


@pytest.mark.slow
def test_both_are_rounded_with_the_energy_of_the_heads_inputs(models: dict[str, Path], tmp_path: Path) -> None:
    options = CompressOptions(prompt=PROMPT, block="32", embedding_bits=4, lm_head_bits=4)
    with open_checkpoint(models["untied"]) as checkpoint:
        prepared = prepare(checkpoint, options)
        weights = {name: checkpoint.read(name) for name in (EMBEDDING, HEAD)}
    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(torch.tensor([prepared.found.token_ids]))
    squares = seen[0].square()
    energy = (squares / squares.sum(1, keepdim=True)).mean(0)
    for table in prepared.plan.tables:
        found = evidence_for(table, prepared.found, options.refinement, None)
        assert found.importance is not None
        assert torch.allclose(found.importance, energy, rtol=1e-4)
        plain = evidence_for(table, prepared.found, "none", None)
        assert (plain.importance, plain.energy is not None) == (None, True)
    out = swquant.compress(models["untied"], tmp_path / "out", options).path
    for name, weight in weights.items():
        wanted = quantize(weight, Group(32), 4, importance=energy, scale_dtype=torch.bfloat16)
        read = decoded(out)[name]
        assert float((read != dequantize(wanted)).float().mean()) < 0.01  # sums in another order
        assert swquant.inspect(out)["tensors"][name]["output_error"] > 0


def test_linear_weights_are_what_they_are_without(models: dict[str, Path], tmp_path: Path) -> None:
    """Rounding the tables changes nothing else: the probe sees the original."""
    plain = decoded(swquant.compress(models["untied"], tmp_path / "a", **HOW).path)
    other = decoded(swquant.compress(models["untied"], tmp_path / "b", **HOW, lm_head_bits=8).path)
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == [HEAD]


@pytest.mark.slow
def test_a_budget_is_one_of_the_linear_weights(models: dict[str, Path]) -> None:
    given = {**HOW, "bits_budget": 5.5, "preset": "balanced"}
    alone = swquant.plan(models["untied"], **given).prepared.plan
    both = swquant.plan(models["untied"], **given, lm_head_bits=8).prepared.plan
    assert [(tensor.name, tensor.bits) for tensor in alone.linear] == [(t.name, t.bits) for t in both.linear]
    assert [tensor.bits for tensor in both.tables] == [8]


# --- what is refused, and what is said


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("tied", {"embedding_bits": 8, "lm_head_bits": 4}, "--embedding-bits 8 and --lm-head-bits 4 contradict each other"),
        ("untied", {"embedding_bits": 5}, "--embedding-bits 5 is not one of: 0, 4, 8"),
        ("untied", {"lm_head_bits": None}, "--lm-head-bits None is not one of: 0, 4, 8"),
        ("gpt2", {"embedding_bits": 8}, "only if all weights share one scheme, not int. group 32 symmetric and int. group 32"),
        ("untied", {"embedding_bits": 8, "symmetric": False}, "no zero points in its modules, .* or --symmetric"),
        ("untied", {"embedding_bits": 8, "offsets": "float"}, "use one number of bits, or --offsets none"),
        ("untied", {"embedding_bits": 8, "format": "gguf"}, "--embedding-bits 8: a GGUF file has types for both"),
        ("untied", {"lm_head_bits": 8, "format": "gguf"}, "--lm-head-bits 8: a GGUF file has types for both"),
        ("untied", {"embedding_bits": 8, "format": "onnx"}, "--embedding-bits 8: an ONNX graph holds codes of an output"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_work(
    model: str, given: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.compress(models[model], tmp_path / "out", **{**HOW, **given})
    assert not (tmp_path / "out").exists()


def test_rows_that_no_block_divides_are_refused(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama", hidden_size=72, head_dim=16, num_hidden_layers=2), tmp_path / "odd")
    said = (
        "--lm-head-bits 8: lm_head.weight cannot be rounded .block 32 does not divide in_features 72 .*; leave it out"
    )
    with pytest.raises(swquant.SwquantError, match=said):
        swquant.plan(folder, **HOW, lm_head_bits=8, allow_dense=True)


def test_dense_keeps_a_table_too(models: dict[str, Path]) -> None:
    plan = swquant.plan(models["untied"], **HOW, lm_head_bits=8, dense=("lm_head",)).prepared.plan
    assert plan.tables == ()
    assert {tensor.name: tensor.reason for tensor in plan.tensors}[HEAD] == "--dense lm_head"


def test_the_command_line_says_what_it_does(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    common = ("--prompt", PROMPT, "--preset", "fast", "--block", "32")
    words = ("compress", models["tied"], tmp_path / "out", "--embedding-bits", "8", *common)
    planned = document(cli(*words, "--dry-run", "--json"))
    assert planned["tensors"][EMBEDDING]["stored_as"] == "int8 group 32 symmetric"
    ran = cli(*words)
    assert ran.code == 0
    assert "transformers: no: its modules hold no packed embedding" in ran.out
    shown = " ".join(cli("inspect", tmp_path / "out").out.split())
    assert "int8 group 32 symmetric" in shown
    assert "--embedding-bits 8" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card
    assert "Rounded, too: the embedding to 8 bits (and what is tied to it)." in card
    assert "embedding and output head" in (tmp_path / "out/swquant/report.html").read_text()
    refused = one_line(cli("verify", tmp_path / "out", "--loads"))
    assert "use swquant.load, or import swquant.hf" in refused
    (tmp_path / "text.txt").write_text(sample_text(60))
    measured = document(
        cli("eval", tmp_path / "out", "--text", tmp_path / "text.txt", "--against", models["tied"], "--json")
    )
    assert 0 < measured["kl"] < 0.1


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("untied", {"lm_head_bits": 4}, "yes; ignores the sidecar"),
        ("untied", {"lm_head_bits": 8}, "yes on CUDA, by its sources; not on a CPU, where its kernel takes 4 bits, not 8"),
        ("untied", {"embedding_bits": 8}, "on CUDA, by its sources, where its model tells the embedding how it is stored"),
        ("untied", {"embedding_bits": 4, "symmetric": False}, "no: its packed embeddings have no zero points"),
        ("tied", {"embedding_bits": 4}, "no: it ties the output head to an embedding of floats, and this one is packed"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_said_of_vllm(model: str, given: dict[str, Any], said: str, models: dict[str, Path]) -> None:
    with open_checkpoint(models[model]) as checkpoint:
        prepared = prepare(checkpoint, CompressOptions(**HOW, **given))
        assert loader_table(prepared.plan)["vLLM"].startswith(said)
        config = checkpoint_config(checkpoint, prepared.plan, prepared.found.architecture)
    groups = config["quantization_config"]["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    assert ("Embedding" in targets) == (model == "untied" and "embedding_bits" in given)
