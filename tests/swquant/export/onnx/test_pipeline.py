"""Export to ONNX: a folder that appears whole or not at all and says what it is, and errors that help."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import onnx_ir
import pytest
from support.command_line import Cli, one_line
from support.exported import SETTINGS, compressed_model
from support.tiny_models import PROMPT, planted_model, sample_text

import swquant
from swquant.export.onnx import pipeline

pytest.importorskip("onnxruntime")


def test_eval_and_generate_run_the_folder(cli: Cli, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    text = sample_text(60)
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
        (("--format", "exl3"), "format 'exl3' is not one of: checkpoint, onnx, gguf, mlx"),
        (("--format", "checkpoint", "--graph", "genai"), "--graph is an option of the export; add --format onnx"),
        (("--accuracy-level", "3"), "--accuracy-level 3 is not one of: 0, 4"),
    ):
        ran = cli(*words, *extra)
        assert (ran.code, problem in ran.err) == (1, True), ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_what_the_builder_refuses_is_known_before_the_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    model = planted_model("opt", tmp_path / "model").folder
    monkeypatch.setattr(pipeline, "written", None)  # would be a TypeError if it came that far
    ran = cli("compress", model, tmp_path / "out", "--format", "onnx", "--graph", "genai", *words, "--prompt", PROMPT)
    assert "builder cannot export this model (it does not know OPTForCausalLM); use --graph dynamo" in one_line(ran)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_is_opened_without_our_operators(cli: Cli, exported: Path) -> None:
    assert swquant.verify(exported, loads=True) == []
    ran = cli("verify", exported, "--loads")
    assert (ran.code, ran.err) == (0, "")
    assert "loads it, without swquant's operators, too" in ran.out


def test_the_manifest_says_what_was_checked(exported: Path) -> None:
    manifest = swquant.inspect(exported)
    check = manifest["check"]
    assert check["largest_difference"] < 1e-4 < check["without_outliers"]
    assert check["same_tokens"] == check["generated_tokens"] == 16
    assert list(check["providers"]) == ["CPUExecutionProvider"]
    assert manifest["operators"]["swquant::LinearNBits"] == len(manifest["weights"]) == 14
    assert swquant.verify(exported) == []


def test_inspect_shows_nodes_and_check(cli: Cli, exported: Path) -> None:
    ran = cli("inspect", exported)
    assert ran.code == 0
    assert "LinearNBits, 4 bits, block 32" in ran.out
    assert "16 of 16 greedy tokens the same" in " ".join(ran.out.split())
    assert json.loads(cli("inspect", exported, "--json").out)["kind"] == "onnx"


def test_an_interrupted_export_leaves_what_the_next_run_goes_on_from(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def compress() -> None:
        swquant.compress(checkpoint.parent / "model", tmp_path / "folder", format="onnx", **SETTINGS)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "make_reference", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".folder.unfinished-")
    compress()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("moment", ["save", "check_export", "write_manifest", "replace"])
def test_a_full_disk_is_one_message_about_space_and_leaves_nothing(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "dynamo_graph", lambda *_: onnx_ir.load(exported / "model.onnx"))
    monkeypatch.setattr(pipeline, moment, fail)
    with pytest.raises(swquant.SwquantError, match=r"no space left; .* GB are free; choose another OUT"):
        swquant.export(checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_for_the_builder_is_known_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(pipeline, "save_for_builder", None)  # would be a TypeError if it came that far
    with pytest.raises(swquant.SwquantError, match="no space left; .* GB are needed"):
        swquant.export(checkpoint, tmp_path / "onnx", graph="genai")
    assert list(tmp_path.iterdir()) == []


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
        swquant.SwquantError,
        match=r"no linear layer of its own \(an expert.*serve the checkpoint with transformers or vLLM",
    ):
        swquant.export(checkpoint, tmp_path / "onnx")
    with pytest.raises(swquant.SwquantError, match="no linear layer of its own"):
        swquant.compress(tmp_path / "model", tmp_path / "again", prompt=PROMPT, format="onnx")


def test_only_compressed_checkpoints_are_exported(cli: Cli, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    ran = cli("export", checkpoint.parent / "model", tmp_path / "onnx")
    assert (ran.code, "make one first: swquant compress" in ran.err) == (1, True)
    ran = cli("export", checkpoint, exported)
    assert (ran.code, "exists already" in ran.err) == (1, True)
    ran = cli("export", checkpoint, tmp_path / "onnx", "--precision", "fp8")
    assert (ran.code, "--precision fp8 is not one of: fp32" in ran.err) == (1, True)
