"""GGUF files from end to end: straight from a model, from a checkpoint, read back by readers that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.command_line import Cli, document, one_line
from support.gguf_models import PROMPT, save_byte_level, save_gguf_model
from support.tiny_models import plant, tiny_model
from torch import Tensor

import swquant
from exporters.errors import SwquantError
from exporters.gguf.names import row_order
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.open import open_checkpoint

IDS = torch.tensor([[5, 77, 120, 9, 300, 41, 222, 17, 63, 190]])


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def decoded(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(IDS).logits[0].float(), -1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_gguf_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(llama: Path) -> Path:
    return swquant.compress(llama, llama.parent / "checkpoint", prompt=PROMPT, block="32", dtype="float16").path


# transformers reads these and gives their weights back; it has its own tables of what llama.cpp changes.
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_the_model_back(name: str, tmp_path: Path) -> None:
    model = save_gguf_model(name, tmp_path / "model")
    written = swquant.compress(
        tmp_path / "model", tmp_path / "out.gguf", format="gguf", type="Q8_0", preset="fast", prompt=PROMPT
    )
    assert written.manifest["architecture"] == name.removesuffix("-tied")
    again = logits(swquant.load(written.path, dtype=torch.float32))
    assert float((again - logits(model)).abs().max()) < 0.15
    with open_checkpoint(written.path) as opened:
        assert opened.tokenizer().encode(PROMPT)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_one_tensor(name: str, tmp_path: Path) -> None:
    save_gguf_model(name, tmp_path / "model")
    swquant.compress(tmp_path / "model", tmp_path / "out.gguf", format="gguf", type="Q4_K", prompt=PROMPT)
    held = tensors(tmp_path / "out.gguf")
    part = {"mixtral": "block_sparse_moe.experts.{}.w2", "qwen3_moe": "mlp.experts.{}.down_proj"}[name]
    stacked = decoded(held["blk.1.ffn_down_exps.weight"])
    with open_checkpoint(tmp_path / "model") as opened:
        for expert in range(4):
            original = opened.read(f"model.layers.1.{part.format(expert)}.weight")
            assert float((stacked[expert] - original).norm() / original.norm()) < 0.1
    assert held["blk.1.ffn_down_exps.weight"].tensor_type.name == "Q4_K"
    assert held["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4.5), ("Q4_1", 5), ("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625)])
def test_the_plan_is_what_is_written(llama: Path, tmp_path: Path, kind: str, bits: float) -> None:
    planned = swquant.plan(llama, format="gguf", type=kind, prompt=PROMPT)
    assert planned.prepared.plan.bits_per_weight == bits
    swquant.compress(llama, tmp_path / "out.gguf", format="gguf", type=kind, prompt=PROMPT)
    held = tensors(tmp_path / "out.gguf")
    assert sum(int(tensor.n_bytes) for tensor in held.values()) == planned.prepared.plan.nbytes
    assert {tensor.tensor_type.name for tensor in held.values()} == {"F32", kind}
    for name, tensor in held.items():
        assert (tensor.tensor_type.name == "F32") == (name in ("token_embd.weight", "output.weight") or "norm" in name)


def test_rows_that_256_does_not_divide_take_another_type(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=384, hidden_size=96, intermediate_size=256, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    save_byte_level(tmp_path / "model")
    planned = swquant.plan(tmp_path / "model", format="gguf", prompt=PROMPT)
    assert "Q4_K takes rows of a multiple of 256 weights; others take Q4_1" in planned.prepared.plan.notes
    written = swquant.compress(tmp_path / "model", tmp_path / "out.gguf", format="gguf", prompt=PROMPT)
    assert written.manifest["types"] == {"F32": 7, "Q4_1": 12, "Q4_K": 2}


def test_the_prompt_decides_and_what_is_asked_for_is_in_the_file(llama: Path, tmp_path: Path) -> None:
    written = swquant.compress(llama, tmp_path / "a.gguf", format="gguf", prompt=PROMPT)
    again = swquant.compress(llama, tmp_path / "b.gguf", format="gguf", prompt=PROMPT)
    plain = swquant.compress(llama, tmp_path / "c.gguf", format="gguf", preset="fast", prompt=PROMPT)
    assert written.path.read_bytes() == again.path.read_bytes()
    assert written.manifest["sha256"] != plain.manifest["sha256"]
    fields = gguf.GGUFReader(written.path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S
    options = json.loads(fields["swquant.options"].contents())
    assert (options["compress"]["prompt"], options["gguf"]["type"]) == (PROMPT, "auto")


@pytest.mark.parametrize(
    ("block", "kind", "types"),
    [("32", "auto", ("Q8_0", "Q4_0")), ("32", "Q4_1", ("Q8_0", "Q4_0")), ("16", "Q8_0", ("F16", "F16"))],
)
def test_tables_of_a_checkpoint_are_what_is_stored(
    llama: Path, tmp_path: Path, block: str, kind: str, types: tuple[str, str]
) -> None:
    """Their codes where a type holds them, whatever becomes of other weights; else what they stand for."""
    given: dict[str, Any] = {"prompt": PROMPT, "preset": "fast", "block": block, "dtype": "float16"}
    out = swquant.compress(llama, tmp_path / "out", embedding_bits=8, lm_head_bits=4, **given).path
    held = tensors(swquant.export(out, tmp_path / "out.gguf", type=kind).path)
    with CompressedCheckpoint(out, unrounded=True) as opened:
        for name, stored, expected in zip(
            ("token_embd.weight", "output.weight"), ("model.embed_tokens.weight", "lm_head.weight"), types, strict=True
        ):
            assert held[name].tensor_type.name == expected
            weight = opened.read(stored)
            assert torch.equal(decoded(held[name]), weight.half().float() if expected == "F16" else weight)
    rounded = tensors(swquant.export(out, tmp_path / "other.gguf", type="Q8_0", embedding_type="Q5_0").path)
    assert {rounded[name].tensor_type.name for name in ("token_embd.weight", "output.weight")} == {"Q5_0"}


def test_codes_of_a_checkpoint_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    written = swquant.export(checkpoint, tmp_path / "out.gguf")
    assert set(written.manifest["types"]) == {"F32", "F16", "Q4_0"}
    held = tensors(written.path)
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", 0)}
    with CompressedCheckpoint(checkpoint, restored=False, unrounded=True) as opened:
        for part, (theirs, heads) in names.items():
            expected = opened.read(f"model.layers.1.{part}.weight")
            expected = expected[row_order(len(expected), heads)] if heads else expected
            assert torch.equal(decoded(held[f"blk.1.{theirs}.weight"]), expected)
        embedding = opened.read("model.embed_tokens.weight")
    assert torch.equal(decoded(held["token_embd.weight"]), embedding.float())
    outliers = swquant.inspect(checkpoint)["tensors"]
    count = sum(record["outliers"] for record in outliers.values() if "outliers" in record)
    assert written.manifest["left_out"] == [
        f"{count} outliers that the sidecar keeps exactly: their codes stand for them"
    ]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"offsets": "float", "block": "32"}, "Q4_1"),
        ({"bits": 8, "block": "64"}, "Q8_0"),
        ({"block": "channel"}, "Q4_0"),
    ],
    ids=str,
)
def test_the_layouts_of_checkpoints(llama: Path, tmp_path: Path, options: dict, kind: str) -> None:
    made = swquant.compress(llama, tmp_path / "checkpoint", prompt=PROMPT, dtype="float16", **options).path
    held = tensors(swquant.export(made, tmp_path / "out.gguf").path)
    with CompressedCheckpoint(made, restored=False, unrounded=True) as opened:
        expected = opened.read("model.layers.1.mlp.up_proj.weight")
    assert held["blk.1.ffn_up.weight"].tensor_type.name == kind
    assert torch.equal(decoded(held["blk.1.ffn_up.weight"]), expected)


def test_a_named_type_rounds_again_with_the_outliers(checkpoint: Path, tmp_path: Path) -> None:
    written = swquant.export(checkpoint, tmp_path / "out.gguf", type="Q8_0", embedding_type="Q6_K")
    assert written.manifest["left_out"] == []
    assert written.manifest["types"] == {"F32": 5, "Q6_K": 2, "Q8_0": 14}
    with CompressedCheckpoint(checkpoint, unrounded=True) as opened:
        expected = opened.read("model.layers.1.mlp.down_proj.weight")
    found = decoded(tensors(written.path)["blk.1.ffn_down.weight"])
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_a_super_weight_is_looked_at_again(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=384, hidden_size=256, intermediate_size=256, num_hidden_layers=3)
    name = plant(model)
    model.save_pretrained(tmp_path / "model")
    save_byte_level(tmp_path / "model")
    planned = swquant.plan(tmp_path / "model", format="gguf", type=kind, prompt=PROMPT)
    places = next(tensor.super_weights for tensor in planned.prepared.plan.tensors if tensor.name == name)
    written = swquant.compress(tmp_path / "model", tmp_path / "out.gguf", format="gguf", type=kind, prompt=PROMPT)
    told = written.manifest["super_weights"]
    assert [(weight["row"], weight["col"]) for weight in told if weight["tensor"] == "blk.1.ffn_down.weight"] == list(
        places
    )
    stored = decoded(tensors(written.path)["blk.1.ffn_down.weight"])
    for weight in told:
        assert float(stored[weight["row"], weight["col"]]) == weight["without_sidecar"]
        assert abs(weight["without_sidecar"] - weight["value"]) <= 0.01 * abs(weight["value"])


def test_a_gguf_source_keeps_its_header(llama: Path, tmp_path: Path) -> None:
    first = swquant.compress(
        llama, tmp_path / "first.gguf", format="gguf", type="Q8_0", preset="fast", prompt=PROMPT
    ).path
    second = swquant.compress(
        first, tmp_path / "second.gguf", format="gguf", type="Q8_0", preset="fast", prompt=PROMPT
    ).path
    one, two = (gguf.GGUFReader(path) for path in (first, second))
    keys = [
        {name: field.contents() for name, field in reader.fields.items() if "options" not in name}
        for reader in (one, two)
    ]
    assert keys[0] == keys[1]
    mine, theirs = tensors(first), tensors(second)
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():  # rounded twice into one type: nothing moves much
        before, after = decoded(tensor), decoded(theirs[name])
        assert before.shape == after.shape
        assert float((before - after).abs().max()) <= 0.01 * float(before.abs().max())


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_the_importance_matrix(llama: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompt{suffix}"
    swquant.compress(llama, tmp_path / "out.gguf", format="gguf", imatrix=str(path), prompt=PROMPT)
    found = swquant.detect(llama, PROMPT)
    expected = found.energy("model.layers.1.mlp.up_proj.weight")
    assert expected is not None
    if suffix == ".gguf":
        reader = gguf.GGUFReader(path)
        held = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
        assert reader.fields["general.type"].contents() == "imatrix"
        assert reader.fields["imatrix.datasets"].contents() == [f"one prompt: {PROMPT}"]
        assert reader.fields["imatrix.chunk_size"].contents() == len(found.token_ids)
        values = held["blk.1.ffn_up.weight.in_sum2"][0] / held["blk.1.ffn_up.weight.counts"][0, 0]
        assert len(held) == 2 * 14
    else:
        values = legacy(path.read_bytes())["blk.1.ffn_up.weight"]
    assert np.allclose(values, expected.numpy(), rtol=1e-5)


def legacy(content: bytes) -> dict[str, np.ndarray]:
    """As llama.cpp's loader reads its old format."""
    found, place = {}, 4

    def integer() -> int:
        nonlocal place
        place += 4
        return int.from_bytes(content[place - 4 : place], "little")

    for _ in range(int.from_bytes(content[:4], "little")):
        length = integer()
        name, place = content[place : place + length].decode(), place + length
        calls, count = integer(), integer()
        found[name] = np.frombuffer(content, "<f4", count, place) / calls
        place += 4 * count
    assert integer() == 1
    assert content[place + 4 :].decode() == f"one prompt: {PROMPT}"
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 3}, r"--bits 3: the GGUF types written here have 4, 5, 6, 8; use one of these"),
    ({"bits": 8, "type": "Q4_K"}, r"--bits 8 and --type Q4_K contradict each other; give one of them"),
    ({"block": "128"}, r"--block 128: the block of a GGUF type is part of it; leave it out, or give 32"),
    ({"outliers": 0.001}, r"--outliers 0.001: a GGUF file has no place for weights beside its blocks; leave it out"),
    ({"offsets": "byte"}, r"--offsets byte: GGUF holds none or float; leave it out, and --type decides"),
    ({"offsets": "float", "type": "Q4_0"}, r"--offsets float: --type Q4_0 says whether there are any; leave it out"),
    ({"activations": "int8"}, r"--activations int8: llama.cpp rounds activations itself; leave it out"),
    ({"symmetric": False}, r"--asymmetric: the GGUF types with an offset are Q4_1, .*; leave it out"),
    ({"bits_budget": 4.5}, r"--bits-budget 4.5: one type for all weights is written here; leave it out"),
    ({"type": "Q2_K"}, r"--type 'Q2_K' is not one of: auto, Q4_0, .*"),
    ({"imatrix": "prompt.txt"}, r"--imatrix prompt.txt: ends in .gguf .* or .dat .*; rename it"),
    ({"embedding_type": "Q3_K"}, r"--embedding-type 'Q3_K' is not one of: stored, .*"),
    ({"tokenizer": "none.gguf"}, r"none.gguf: not a readable GGUF file \(.*\); give another"),
    ({"graph": "genai"}, r"--graph is an option of the export; add --format onnx"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_file_cannot_hold_is_refused(llama: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=f"^{message}$"):
        swquant.compress(llama, tmp_path / "out.gguf", format="gguf", prompt=PROMPT, **options)
    assert list(tmp_path.iterdir()) == []


CONFIGURATIONS = [
    ("gemma3", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16, and llama.cpp's graph takes 256"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is off"),
    ("llama", {"hidden_act": "gelu"}, "its MLP has gelu, llama.cpp's graph of llama silu"),
    ("smollm3", {"no_rope_layers": [1] * 4}, "no_rope_layers is not every fourth"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type 'dynamic'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONFIGURATIONS, ids=lambda value: str(value)[:30])
def test_a_graph_that_is_another_is_refused(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    save_gguf_model(name, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(SwquantError, match=message):
        swquant.compress(tmp_path / "model", tmp_path / "out.gguf", format="gguf", preset="fast", prompt=PROMPT)
    assert not (tmp_path / "out.gguf").exists()


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    tiny_model("opt", vocab_size=384).save_pretrained(tmp_path / "model")
    save_byte_level(tmp_path / "model")
    with pytest.raises(
        SwquantError, match=r"^model: GGUF files of 'opt' are not known here; known are llama, mistral, "
    ):
        swquant.plan(tmp_path / "model", format="gguf", prompt="a b")


def test_codes_that_no_type_holds_are_refused(llama: Path, tmp_path: Path) -> None:
    made = swquant.compress(llama, tmp_path / "checkpoint", prompt=PROMPT, bits=3).path
    with pytest.raises(
        SwquantError, match=r"has codes of 3 bits; a GGUF block holds 4, 5, 8, or export with --type Q8_0"
    ):
        swquant.export(made, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert swquant.export(made, tmp_path / "out.gguf", type="Q4_1").manifest["types"]["Q4_1"] == 14


def test_a_vocabulary_may_come_from_another_file(llama: Path, tmp_path: Path) -> None:
    first = swquant.compress(llama, tmp_path / "first.gguf", format="gguf", preset="fast", prompt=PROMPT).path
    written = swquant.compress(
        llama, tmp_path / "second.gguf", format="gguf", preset="fast", prompt=PROMPT, tokenizer=str(first)
    ).path
    one, two = (gguf.GGUFReader(path).fields for path in (first, written))
    names = [name for name in one if name.startswith("tokenizer.")]
    assert len(names) > 5
    assert {name: two[name].contents() for name in names} == {name: one[name].contents() for name in names}


def test_only_our_own_files_are_replaced(llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"GGUF but not one")
    with pytest.raises(SwquantError, match=r"exists already; give another OUT, or --overwrite to replace it$"):
        swquant.export(checkpoint, out)
    with pytest.raises(
        SwquantError, match=r"no GGUF file that swquant wrote, so it is not replaced; give another OUT$"
    ):
        swquant.export(checkpoint, out, overwrite=True)
    assert out.read_bytes() == b"GGUF but not one"
    out.unlink()
    swquant.export(checkpoint, out)
    before = out.read_bytes()
    swquant.export(checkpoint, out, overwrite=True, embedding_type="Q8_0")
    assert out.read_bytes() != before
    with pytest.raises(SwquantError, match=r"is named NAME.gguf"):
        swquant.compress(llama, tmp_path / "out.bin", format="gguf", prompt=PROMPT)
    with pytest.raises(SwquantError, match=r"--imatrix: a checkpoint has no energies"):
        swquant.export(checkpoint, tmp_path / "other.gguf", imatrix="a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_the_commands(cli: Cli, llama: Path, checkpoint: Path, tmp_path: Path) -> None:
    ran = cli("compress", llama, tmp_path / "a.gguf", "--format", "gguf", "--type", "Q4_1", "--prompt", PROMPT)
    assert "Tensors of llama: 7 F32, 14 Q4_1" in ran.out
    assert "every byte read again" in ran.out
    shown = document(cli("compress", llama, "--format", "gguf", "--dry-run", "--json", "--prompt", PROMPT))
    assert shown["tensors"]["model.layers.0.mlp.up_proj.weight"]["stored_as"] == "Q4_K"
    assert shown["export"]["type"] == "auto"
    told = document(cli("export", checkpoint, tmp_path / "b.gguf", "--json"))
    assert told["manifest"]["types"]["Q4_0"] == 14
    assert cli("export", checkpoint, tmp_path / "c.gguf", "--type", "Q5_K").code == 0
    line = one_line(cli("export", checkpoint, tmp_path / "d.gguf", "--graph", "genai"))
    assert line == "error: --graph is an option of the export; add --format onnx"
    assert one_line(cli("export", checkpoint, tmp_path / "d", "--format", "exl3")).startswith(
        "error: format 'exl3' is not one of"
    )
