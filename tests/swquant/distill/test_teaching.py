"""Teaching: the loss, the stages, what moves and what does not, and going on after an interruption."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from support.command_line import Cli
from support.tiny_models import Planted, sample_text
from torch import Tensor, nn

import swquant
from exporters.errors import SwquantError
from swquant.declared import flag
from swquant.distill.stages import Stages

TEXT = ("words", sample_text(600))
HOW = {"layers": "0-3", "steps": 6, "batch": 2, "window": 24, "lr": "1e-3"}


def test_a_student_learns_and_its_embeddings_stay(planted_llama: Planted, tmp_path: Path) -> None:
    result = swquant.distill(planted_llama.folder, tmp_path / "out", text=TEXT, kd_until="0.5", **HOW)  # type: ignore[arg-type]
    lesson = result.lesson
    assert lesson is not None
    assert lesson.after[0] < lesson.before[0]
    assert (lesson.until, lesson.looks, len(lesson.losses)) == (3, [], 6)
    plain = swquant.distill(planted_llama.folder, tmp_path / "plain", layers="0-3")
    before, after = swquant.load(plain.path).state_dict(), swquant.load(result.path).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_loss_with_the_teacher_is_that_of_the_paper(planted_llama: Planted, tmp_path: Path) -> None:
    """The first loss is L + alpha T² KL of the student that was cut, by hand."""
    first = {}
    for alpha, until in ((0.0, "always"), (2.0, "always"), (2.0, "never")):
        how = {**HOW, "steps": 1, "alpha": alpha, "temperature": 2.0, "kd_until": until}
        out = tmp_path / f"{alpha}-{until}"
        result = swquant.distill(planted_llama.folder, out, text=TEXT, **how)  # type: ignore[arg-type]
        assert result.lesson is not None
        first[alpha, until] = result.lesson.losses[0]
    assert first[2.0, "never"] == first[0.0, "always"]
    plain = swquant.load(swquant.distill(planted_llama.folder, tmp_path / "plain", layers="0-3").path)
    teacher = swquant.load(planted_llama.folder)
    data = importlib.import_module("swquant.training.data")
    with importlib.import_module("swquant.checkpoints.open").open_checkpoint(planted_llama.folder) as checkpoint:
        batch = data.text_windows(checkpoint, TEXT[1], 24).split()[0].drawn(0, 2, 0)
    with torch.no_grad():
        ours, theirs = ((model(batch.ids).logits[:, :-1] / 2).log_softmax(-1) for model in (plain, teacher))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert first[2.0, "always"] - first[0.0, "always"] == pytest.approx(2.0 * 4 * kl, rel=1e-3)


def test_training_goes_on_where_it_was_stopped(
    planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = swquant.distill(planted_llama.folder, tmp_path / "whole", texts=12, **HOW)  # type: ignore[arg-type]
    teaching = importlib.import_module("swquant.distill.teaching")
    balance, calls = teaching.balance, 0

    def stop(model: nn.Module, share: float) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return balance(model, share)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(teaching, "balance", stop)
        with pytest.raises(KeyboardInterrupt):
            swquant.distill(planted_llama.folder, tmp_path / "out", texts=12, **HOW)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.training", "whole"]
    stopped = swquant.distill(planted_llama.folder, tmp_path / "out", texts=12, **HOW)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert stopped.lesson == whole.lesson
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_learning_rate_is_found_out(planted_llama: Planted, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "text").write_text(TEXT[1])
    typed = [
        word for name, value in {**HOW, "lr": "auto", "kd_until": "never"}.items() for word in (flag(name), str(value))
    ]
    ran = cli("distill", planted_llama.folder, tmp_path / "out", "--text", tmp_path / "text", *typed)
    assert ran.code == 0, ran.err
    lesson = json.loads((tmp_path / "out/swquant/distill.json").read_text())["lesson"]
    assert 3 <= len(lesson["tried"]) <= 6
    assert lesson["tried"][f"{lesson['rate']:g}"] == min(lesson["tried"].values())
    assert "Rates by held-out loss" in " ".join(ran.out.split())


def test_a_mixture_has_students(planted_llama: Planted, tmp_path: Path) -> None:
    """The paper's mixture of students."""
    swquant.moe(planted_llama.folder, tmp_path / "mixture", expert_size=16)
    result = swquant.distill(tmp_path / "mixture", tmp_path / "out", text=TEXT, **{**HOW, "layers": "0-1,3,5"})  # type: ignore[arg-type]
    assert result.difference == 0
    student = swquant.load(result.path)
    assert [item["module"] for item in student.config.mixtures] == [
        "model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp",
    ]  # fmt: skip
    assert (result.path / "modeling_pr_moe.py").exists()


def staged(until: int | None, alone: float) -> tuple[Stages, list[bool]]:
    """Stages over one weight that either loss pulls down, without the teacher `alone` times as fast."""
    weight, seen = nn.Parameter(torch.tensor([5.0])), []

    def loss_of(step: int, taught: bool) -> Tensor:
        seen.append(taught)
        return (weight * (1.0 if taught else alone)).sum()

    return Stages(100, 0.1, until, {"w": weight}, loss_of, lambda: float(weight.detach()), {}), seen


def test_a_stage_ends_where_it_was_told_to() -> None:
    stages, seen = staged(3, 1.0)
    for step in range(6):
        stages.loss(step, 0)
    assert seen == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("alone", "until"), [(2.0, None), (-1.0, None)])
def test_a_stage_ends_by_itself_when_the_student_learns_faster_alone(alone: float, until: None) -> None:
    """Adam takes steps of one size whatever the gradient is, so only its sign matters: -1 climbs."""
    stages, seen = staged(until, alone)
    before = float(stages.parameters["w"].detach())
    for step in range(100):
        stages.loss(step, 0)
    assert float(stages.parameters["w"].detach()) == before  # looking ahead is put back
    assert [look["step"] for look in stages.facts["looks"]] == [20, 40, 60, 80]
    assert "until" not in stages.facts
    assert seen[-1]
    stages.held_out = lambda: 1.0 if not seen[-1] else 2.0
    stages.facts["looks"].clear()
    stages.loss(20, 0)
    assert stages.facts["until"] == 20
    assert not seen[-1]
    stages.loss(19, 0)
    assert seen[-1]


def test_a_text_that_is_too_short_and_a_loss_that_explodes(planted_llama: Planted, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="less than two windows"):
        swquant.distill(planted_llama.folder, tmp_path / "out", text=("words", "t5"), **HOW)  # type: ignore[arg-type]
    with pytest.raises(SwquantError, match="NaN or infinite at a learning rate"):
        swquant.distill(planted_llama.folder, tmp_path / "out", text=TEXT, **{**HOW, "temperature": 1e-38})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
