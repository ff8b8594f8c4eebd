"""Students without training: the teacher with layers left out, an ordinary folder, in many families."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.command_line import Cli, document
from support.tiny_gguf import write_gguf
from support.tiny_models import ARCHITECTURES, PROMPT, TOKENS, Planted, read_config, sample_text, save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from calibrationless.super_weights import Detection, SuperWeight
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.distill.measure import _Trial, least_missed, leaving_out, super_layers
from swquant.distill.student import cut_config, cut_names
from swquant.models.loading import build_model

FAST = ("llama", "phi3", "gemma3", "gpt2", "falcon", "mixtral")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_a_student_is_the_teacher_without_layers(family: str, tmp_path: Path) -> None:
    """Stock transformers loads it, finds all weights, and computes what is left of the teacher."""
    teacher = tiny_model(family)
    save_model(teacher, tmp_path / "teacher")
    result = swquant.distill(tmp_path / "teacher", tmp_path / "out", layers="0-1,3,last")
    assert result.difference <= 1e-6
    assert (result.keep, result.dropped) == ((0, 1, 3, 5), (2, 4))
    student, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(student) is type(teacher)
    layers = [name for name, _ in teacher.named_modules() if name.endswith((".layers.2", ".layers.4", ".h.2", ".h.4"))]
    with torch.no_grad(), leaving_out(teacher, layers):
        torch.testing.assert_close(
            student(TOKENS).logits, teacher(TOKENS, use_cache=False).logits, atol=1e-5, rtol=1e-4
        )


def test_what_is_said_per_layer_is_cut_alike() -> None:
    config = tiny_model("gemma3", num_hidden_layers=12, layer_types=None).config
    assert [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11]
    cut = cut_config({"num_hidden_layers": 12, "eos_token_id": [*range(12)]}, config, [0, 5, 11], 12)
    assert cut["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert cut["num_hidden_layers"] == 3
    assert cut["eos_token_id"] == [*range(12)]
    moe = tiny_model("qwen3_moe", mlp_only_layers=[1, 4]).config
    assert cut_config(moe.to_dict(), moe, [0, 1, 4, 5], 6)["mlp_only_layers"] == [1, 2]


def test_names_are_renumbered() -> None:
    names = ["h.0.a", "h.1.a", "h.2.attn.h.1.b", "wte.weight"]
    assert cut_names(names, "transformer.h", [0, 2]) == {
        "h.0.a": "h.0.a", "h.1.attn.h.1.b": "h.2.attn.h.1.b", "wte.weight": "wte.weight",
    }  # fmt: skip


def test_a_layer_that_would_become_another_kind_is_refused(tmp_path: Path) -> None:
    """Qwen2's first layers look at all tokens, by their number: layer 4 of it would look at all as layer 2."""
    settings = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "decoder_sparse_step": 2}
    teacher = tiny_model("qwen3_moe", **settings)
    save_model(teacher, tmp_path / "teacher")
    with pytest.raises(SwquantError, match="would be another kind of layer"):
        swquant.distill(tmp_path / "teacher", tmp_path / "out", layers="1-5")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_auto_leaves_out_what_is_missed_least(tmp_path: Path) -> None:
    """A layer that adds nothing goes first; what every one costs is what leaving it out by hand shows."""
    teacher = tiny_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            teacher.get_submodule(f"model.layers.4.{name}").weight.zero_()
    save_model(teacher, tmp_path / "teacher")
    result = swquant.distill(tmp_path / "teacher", tmp_path / "out", keep_layers="4")
    assert result.measured is not None
    assert result.measured.order[0] == (4, pytest.approx(0, abs=1e-6))
    assert len(result.keep) == 4
    assert result.measured.alone.keys() == {*range(6)}
    second = result.measured.order[1][0]
    assert result.measured.alone[second] == pytest.approx(result.measured.order[1][1], abs=1e-6)  # 4 did nothing
    assert second == min((layer for layer in range(6) if layer != 4), key=result.measured.alone.__getitem__)


@pytest.mark.parametrize("family", ["llama", "falcon"])  # layers that return a tensor, and a tuple
def test_what_is_not_computed_again_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    layers = [name for name, _ in model.named_modules() if re.fullmatch(r".*\.(layers|h)\.\d", name)]
    trial = _Trial(model, layers, TOKENS)
    with torch.no_grad():
        assert torch.equal(trial.whole(()), model(TOKENS, use_cache=False).logits[0])
        for gone in ([], [3], [3, 1]):
            trial.whole(gone)
            for layer in {*range(6)} - {*gone}:
                with leaving_out(model, [layers[other] for other in (*gone, layer)]):
                    expected = model(TOKENS, use_cache=False).logits[0]
                torch.testing.assert_close(trial.without(layer, gone), expected, atol=0, rtol=0)


def test_a_layer_with_a_creator_and_its_companions_creates() -> None:
    """As SmolLM2's layer 11."""
    weights = [
        SuperWeight("w", layer, 0, 0, 1.0, role, 0, 1.0, 1.0, 1.0, 1.0)
        for layer, role in ((1, "creator"), (2, "amplifier"), (1, "companion"), (2, "companion"))
    ]
    detection = Detection(tuple(weights), (replace(weights[0], layer=4, role="canceller"),))
    found = SimpleNamespace(detection=detection)
    assert super_layers(found) == {1: "creates", 2: "amplifies", 4: "cancels"}  # type: ignore[arg-type]


def test_layers_of_super_activations_stay(planted_llama: Planted, tmp_path: Path) -> None:
    with open_checkpoint(planted_llama.folder) as checkpoint:
        model = build_model(checkpoint, torch.float32)
        found = importlib.import_module("swquant.detect.pipeline").find_super_weights(checkpoint, PROMPT, model=model)
        measured = least_missed(checkpoint, model, found, 4, [1], seed=0)
        assert 1 not in measured.dropped
        assert measured.alone[1] > 0
        with pytest.raises(SwquantError, match="6 layers are to go, 5 of 6 may"):
            least_missed(checkpoint, model, found, 6, [1], seed=0)
    said = swquant.distill(planted_llama.folder, tmp_path / "out", layers="0,2-5")
    assert said.keep == (0, 2, 3, 4, 5)


def test_a_student_is_compressed_verified_and_measured(planted_llama: Planted, tmp_path: Path) -> None:
    student = swquant.distill(planted_llama.folder, tmp_path / "student", layers="0-3").path
    result = swquant.compress(student, tmp_path / "w4", prompt=PROMPT, block="64")
    assert swquant.verify(result.path, loads=True) == []
    weights = swquant.inspect(result.path)["detection"]["super_weights"]
    assert [(weight["row"], weight["col"]) for weight in weights] == [(37, 101)]
    scores = swquant.evaluate(result.path, sample_text(120), student, window=64)
    assert scores.kl is not None
    assert scores.kl < 0.05


def test_a_gguf_file_has_students(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    result = swquant.distill(tmp_path / "tiny.gguf", tmp_path / "out", layers="0-3")
    assert read_config(result.path)["dtype"] == "bfloat16"
    assert read_config(result.path)["num_hidden_layers"] == 4
    assert AutoModelForCausalLM.from_pretrained(result.path).dtype is torch.bfloat16


def test_what_has_no_students(
    compressed: Path, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SwquantError, match="compressed; distill the original"):
        swquant.distill(compressed, tmp_path / "out")
    with pytest.raises(SwquantError, match="they are 0 to 5"):
        swquant.distill(planted_llama.folder, tmp_path / "out", layers="0-9")
    monkeypatch.setattr(importlib.import_module("swquant.distill.plan"), "available_memory", lambda: 1000)
    with pytest.raises(SwquantError, match="of memory"):
        swquant.distill(planted_llama.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_loads_nothing(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module("swquant.distill.pipeline"), "build_model")
    (tmp_path / "text").write_text(sample_text(200))
    typed = ["distill", planted_llama.folder, tmp_path / "out", "--dry-run", "--steps", "10", "--window", "16", "--text", tmp_path / "text"]  # fmt: skip
    named = document(cli(*typed, "--layers", "0-2,last", "--json"))
    assert (named["keep"], named["count"], named["tokens"]) == ([0, 1, 2, 5], 4, 10 * 4 * 16)
    assert named["text"] == {"name": "text", "windows": 12}
    student = named["weights"]
    with open_checkpoint(planted_llama.folder) as teacher:
        whole = sum(form.numel for form in teacher.tensors.values())
        layer = sum(form.numel for name, form in teacher.tensors.items() if ".layers.3." in name)
    assert student == whole - 2 * layer
    assert named["memory"] == 4 * (whole + 8 * student)
    assert named["seconds"] > 0
    assert document(cli(*typed, "--keep-layers", "4", "--json"))["weights"] == student
    ran = cli(*typed, "--keep-layers", "4")
    assert "4 of 6 layers would stay, those that are missed most" in ran.out
    assert "10 steps of 4 x 16 tokens, 640 in all, of text (12 windows)" in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_what_is_wrong_is_known_before_anything_is_loaded(
    planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(importlib.import_module("swquant.distill.pipeline"), "build_model")
    for given, problem in (
        ({"text": ("words", "t5"), "steps": 1, "window": 16}, "less than two windows"),
        ({"text": ("words", sample_text(999))}, "--text is learned on with --steps"),
        ({"device": "tpu"}, "is not one of: auto, cpu"),
        ({"layers": "0-9"}, "they are 0 to 5"),
    ):
        with pytest.raises(SwquantError, match=problem):
            swquant.distill(planted_llama.folder, tmp_path / "out", **given)  # type: ignore[arg-type]


def test_the_command(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    ran = cli("distill", planted_llama.folder, tmp_path / "out", "--keep-layers", "5")
    assert ran.code == 0, ran.err
    assert "Layers left out" in ran.out
    assert "5 of 6 layers stay" in ran.out
    assert cli("distill", planted_llama.folder, tmp_path / "out").err.count("\n") == 1
