"""`moe`: identical at start in many families, written, compressed, trained, and what it refuses."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import Cli
from support.tiny_gguf import write_gguf
from support.tiny_models import (
    PROMPT,
    TOKENS,
    Planted,
    planted_model,
    random_model,
    read_config,
    sample_text,
    save_model,
    tiny_config,
    tiny_model,
)
from transformers import AutoModelForCausalLM

import swquant
from exporters.errors import SwquantError
from swquant.moe.options import MoeOptions

FAMILIES = ("llama", "mistral", "qwen3", "olmo2", "phi3", "gemma3", "gpt2", "gpt_neox", "falcon")
WAYS = (
    {},
    {"residual": False},
    {"top": 2, "every": 1, "experts": "2x2,3x4"},
    {"expert_size": 40, "top": 2},
    {"residual": False, "top": 2},
)


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, id=f"{family} {way}", marks=() if number == place % len(WAYS) else pytest.mark.slow)
        for place, family in enumerate(FAMILIES)
        for number, way in enumerate(WAYS)
    ],
)
def test_it_computes_what_the_model_computes(family: str, way: dict, tmp_path: Path) -> None:
    dense = tiny_model(family)
    save_model(dense, tmp_path / "model")
    result = swquant.moe(tmp_path / "model", tmp_path / "out", **way)
    assert result is not None
    mixture = swquant.load(result.path)
    with torch.no_grad():
        difference = float((mixture(TOKENS).logits - dense(TOKENS).logits).abs().max())
    assert max(difference, result.difference) <= (0 if MoeOptions(**way).residual else 5e-6)
    assert sum(value.numel() for value in mixture.parameters()) == result.plan.total


MORE = {
    "qwen2": tiny_config("qwen2"),
    "gemma2": tiny_config("gemma2", head_dim=16),
    "smollm3": tiny_config("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 1]),
}


@pytest.mark.parametrize("family", MORE)
def test_more_families_compute_what_they_computed(family: str, tmp_path: Path) -> None:
    dense = random_model(MORE[family])
    save_model(dense, tmp_path / "model")
    for number, way in enumerate(({}, {"residual": False}) if family == "gemma2" else ({},)):
        result = swquant.moe(tmp_path / "model", tmp_path / f"out{number}", experts="3x2", **way)  # type: ignore[arg-type]
        assert result is not None
        assert result.difference <= (0 if not way else 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_transformers_loads_what_is_written_as_qwen2_moe(family: str, tmp_path: Path) -> None:
    dense = random_model(tiny_config(family))
    save_model(dense, tmp_path / "model")
    how = {"experts": "3x4", "expert_size": 32, "top": 2, "as_": "qwen2_moe"}
    result = swquant.moe(tmp_path / "model", tmp_path / "out", **how)  # type: ignore[arg-type]
    assert result is not None
    mixture, info = AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert type(mixture).__name__ == "Qwen2MoeForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(value.numel() for value in mixture.parameters()) == result.plan.total
    with torch.no_grad():
        assert float((mixture(TOKENS).logits - dense(TOKENS).logits).abs().max()) <= 1e-6
    assert result.difference <= 1e-6
    assert "pr_moe" not in (result.path / "config.json").read_text()
    assert swquant.verify(swquant.compress(result.path, tmp_path / "w4", prompt=PROMPT, block="32").path) == []


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("qwen3", {"head_dim": 16}, "takes decoders of llama, mistral, qwen2, this is qwen3"),
        ("mistral", {"sliding_window": 8}, "has no window in every layer"),
        ("llama", {"attention_bias": True}, "has no place for model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_what_is_no_qwen2_moe(family: str, changes: dict, problem: str, tmp_path: Path) -> None:
    save_model(random_model(tiny_config(family, **changes)), tmp_path / "model")
    with pytest.raises(SwquantError, match=re.escape(problem)):
        swquant.moe(tmp_path / "model", tmp_path / "out", experts="3x2", as_="qwen2_moe")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_pyramid_grows_with_depth() -> None:
    assert MoeOptions(experts="pyramid:8").experts_of(24) == {**dict.fromkeys(range(1, 21, 2), 8), 21: 16, 23: 16}
    assert MoeOptions(experts="2x4,1x2", every=3).experts_of(12) == {5: 4, 8: 4, 11: 2}
    assert MoeOptions(experts="pyramid:2", every=1).experts_of(2) == {0: 2, 1: 4}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"experts": "4"}, "neither LAYERSxEXPERTS"),
        ({"experts": "2x4,x"}, "neither LAYERSxEXPERTS"),
        ({"experts": "0x4"}, "neither LAYERSxEXPERTS"),
        ({"experts": "1x99999"}, "at most 4096"),
        ({"experts": "pyramid:9999"}, "more than 4096"),
        ({"experts": "2x1"}, "needs 2 or more"),
        ({"every": 0}, "no distance"),
        ({"top": 3}, "not one of: 1, 2"),
        ({"expert_size": 0}, "leaves no neuron"),
        ({"expert_size": 8, "residual": False}, "needs --residual"),
        ({"steps": -1}, "too few"),
        ({"lr": "nan"}, "no rate"),
        ({"capacity": -1.0}, "outside 0"),
        ({"as_": "qwen2_moe", "experts": "3x4", "residual": False}, "every mixture of it has a fixed MLP"),
        ({"as_": "qwen2_moe", "experts": "3x4", "steps": 1}, "a trained expert has a coefficient"),
        ({"as_": "qwen2_moe"}, "one number of experts in all layers, not --experts pyramid:4"),
        ({"as_": "qwen2_moe", "experts": "2x4,1x8"}, "one number of experts"),
        ({"as_": "mixtral"}, "--as 'mixtral' is not one of: pr_moe, qwen2_moe"),
    ],
)
def test_options_that_make_no_sense(options: dict, problem: str) -> None:
    with pytest.raises(SwquantError, match=problem):
        MoeOptions(**options)


@pytest.mark.parametrize(
    ("family", "options", "problem"),
    [
        ("llama", {"experts": "4x2"}, "places for 3 in 6 layers"),
        ("llama", {"expert_size": 129}, "has 128 neurons"),
        ("llama", {"steps": 2}, "go together"),
        ("llama", {"experts": "pyramid:2000", "expert_size": None}, "of memory"),
        ("opt", {}, "in the layer itself"),
        ("mixtral", {}, "experts already"),
        ("gpt_oss", {}, "experts already"),
    ],
)
def test_what_cannot_be_a_mixture(
    family: str, options: dict, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("swquant.moe.plan"), "available_memory", lambda: 100_000_000)
    save_model(tiny_model(family), tmp_path / "model")
    shown: list[object] = []
    with pytest.raises(SwquantError, match=problem):
        swquant.moe(tmp_path / "model", tmp_path / "out", on_plan=shown.append, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert shown == []  # nobody is shown a plan to be refused


def test_mixtures_and_compressed_checkpoints_are_not_made_into_mixtures(
    compressed: Path, planted_llama: Planted, tmp_path: Path
) -> None:
    with pytest.raises(SwquantError, match="compressed; make the mixture of the original"):
        swquant.moe(compressed, tmp_path / "out")
    swquant.moe(planted_llama.folder, tmp_path / "out")
    with pytest.raises(SwquantError, match="a mixture already"):
        swquant.moe(tmp_path / "out", tmp_path / "again")
    with pytest.raises(SwquantError, match="exists already"):
        swquant.moe(planted_llama.folder, tmp_path / "out")


@pytest.fixture(scope="module")
def mixture(planted_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = swquant.moe(planted_llama.folder, tmp_path_factory.mktemp("mixture") / "out", every=1, expert_size=64)
    assert result is not None
    return result.path


def test_it_is_compressed_verified_and_run(mixture: Path, planted_llama: Planted, tmp_path: Path) -> None:
    found = swquant.detect(mixture, PROMPT)
    assert [(w.name, w.row, w.col) for w in found.detection.super_weights] == [
        ("model.model.layers.1.mlp.mlp.down_proj.weight", 37, 101)
    ]
    result = swquant.compress(mixture, tmp_path / "w4", prompt=PROMPT, block="64")
    experts = {name: record for name, record in result.manifest["tensors"].items() if ".experts." in name}
    assert len(experts) == 3 * (5 * 4 + 8)
    assert all("dense" not in record for record in experts.values())
    assert swquant.verify(result.path, loads=True) == []
    assert result.manifest["loaders"]["vLLM"].startswith("no")
    assert result.manifest["loaders"]["transformers"].startswith("no")
    scores = swquant.evaluate(result.path, sample_text(120), planted_llama.folder, window=64)
    assert scores.kl is not None
    assert scores.kl < 0.03
    assert swquant.generate(result.path, PROMPT, tokens=3)


@pytest.mark.slow
def test_it_is_exported(mixture: Path, tmp_path: Path) -> None:
    """Every expert computes all tokens in the graph: that the logits are the same, the export checks itself."""
    compressed = swquant.compress(mixture, tmp_path / "w4", prompt=PROMPT, block="64").path
    exported = swquant.export(compressed, tmp_path / "onnx", graph="dynamo").path
    scores = swquant.evaluate(exported, sample_text(80), compressed, window=32)
    assert scores.kl == pytest.approx(0, abs=1e-3)
    with pytest.raises(SwquantError, match="cannot export this model"):
        swquant.export(compressed, tmp_path / "genai", graph="genai")


def test_text_of_its_own_reaches_only_some_experts(mixture: Path, tmp_path: Path) -> None:
    result = swquant.compress(mixture, tmp_path / "best", prompt=PROMPT, block="64", preset="best", texts=1)
    assert swquant.verify(result.path) == []


def test_it_loads_where_swquant_is_not(mixture: Path) -> None:
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(mixture)!r}, trust_remote_code=True); "
        "assert 'swquant' not in sys.modules; print(type(model).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.stdout.split()[-1:] == ["PrMoeForCausalLM"], ran.stderr


def test_a_gguf_file_becomes_a_mixture_in_bfloat16(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    result = swquant.moe(tmp_path / "tiny.gguf", tmp_path / "out", expert_size=32)
    assert result is not None
    assert result.difference == 0
    config = read_config(result.path)
    assert (config["dtype"], config["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    assert swquant.load(result.path).dtype is torch.bfloat16


def test_training_learns_and_leaves_the_rest_alone(planted_llama: Planted, tmp_path: Path) -> None:
    text = ("words", sample_text(600))
    how = {"steps": 12, "batch": 2, "window": 24, "lr": "3e-3", "expert_size": 32}
    result = swquant.moe(planted_llama.folder, tmp_path / "out", text=text, **how)  # type: ignore[arg-type]
    assert result is not None
    assert result.course is not None
    assert result.course.after < result.course.before
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in result.course.shares)
    assert not (tmp_path / "out.training").exists()
    untrained = swquant.moe(planted_llama.folder, tmp_path / "untrained", expert_size=32)
    assert untrained is not None
    before, after = swquant.load(untrained.path).state_dict(), swquant.load(result.path).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".experts." in name or ".gate." in name or ".coefficient." in name for name in changed)


@pytest.mark.slow
def test_a_learning_rate_is_found_out(planted_llama: Planted, tmp_path: Path) -> None:
    """Capacity is that of training while steps are taken, and none while held-out text is read."""
    how = {"steps": 6, "batch": 2, "window": 24, "lr": "auto", "expert_size": 16, "experts": "3x2"}
    result = swquant.moe(planted_llama.folder, tmp_path / "out", text=("words", sample_text(600)), **how)  # type: ignore[arg-type]
    assert result is not None
    assert result.course is not None
    assert 3 <= len(result.course.tried) <= 6
    assert result.course.tried[f"{result.course.rate:g}"] == min(result.course.tried.values())  # type: ignore[type-var]
    assert len(result.course.losses) == 6


def test_training_goes_on_where_it_was_stopped(
    planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, how = ("words", sample_text(600)), {"steps": 6, "batch": 2, "window": 24, "expert_size": 16}
    whole = swquant.moe(planted_llama.folder, tmp_path / "whole", text=text, **how)  # type: ignore[arg-type]
    from swquant.training import losses

    calls = 0

    def balance(model: object, share: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return losses.balance(model, share)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("swquant.moe.training"), "balance", balance)
        with pytest.raises(KeyboardInterrupt):
            swquant.moe(planted_llama.folder, tmp_path / "out", text=text, **how)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.training", "whole"]
    stopped = swquant.moe(planted_llama.folder, tmp_path / "out", text=text, **how)  # type: ignore[arg-type]
    assert whole is not None
    assert stopped is not None
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert stopped.course == whole.course


def test_the_command_shows_the_plan_and_the_result(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = cli("moe", planted_llama.folder, out, "--experts", "1x2,2x3", "--dry-run")
    assert ran.code == 0, ran.err
    assert "Mixtures of tiny-llama" in ran.out
    assert not out.exists()
    ran = cli("moe", planted_llama.folder, out, "--experts", "1x2,2x3", "--json")
    record = json.loads(ran.out)
    assert record["difference"] == 0
    assert [item["experts"] for item in record["mixtures"]] == [2, 3, 3]
    assert cli("moe", planted_llama.folder, out).err.count("\n") == 1
    (tmp_path / "text.txt").write_text(sample_text(300))
    ran = cli(
        "moe", planted_llama.folder, tmp_path / "trained", "--text", tmp_path / "text.txt", "--steps", 2, "--window", 16
    )
    assert ran.code == 0, ran.err
    assert "Held-out tokens by expert" in ran.out


def test_too_short_a_text_is_refused_before_the_work(planted_llama: Planted, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="less than two windows"):
        swquant.moe(planted_llama.folder, tmp_path / "out", text=("words", "t5 t9"), steps=2, window=16)
    with pytest.raises(SwquantError, match="outside 2 to 128"):
        swquant.moe(planted_llama.folder, tmp_path / "out", text=("words", sample_text(600)), steps=2, window=4096)


@pytest.mark.slow
def test_planted_families_keep_their_super_weight(tmp_path: Path) -> None:
    for family in ("qwen3", "gemma3", "phi3"):
        planted = planted_model(family, tmp_path / family)
        result = swquant.moe(planted.folder, tmp_path / f"{family}-moe", expert_size=16, every=1)
        assert result is not None
        weights = swquant.detect(result.path, PROMPT).detection.super_weights
        assert [(weight.row, weight.col) for weight in weights][:1] == [(planted.row, planted.col)]
