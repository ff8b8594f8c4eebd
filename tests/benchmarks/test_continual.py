"""benchmarks/continual.py: its tasks are what they say, and it goes on where it stopped."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant

sys.path.insert(0, str(PROJECT / "benchmarks"))

import continual
import tasks


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (7, "seven"),
        (40, "forty"),
        (215, "two hundred fifteen"),
        (90_001, "ninety thousand one"),
        (12_300, "twelve thousand three hundred"),
    ],
)
def test_numbers_are_said(number: int, words: str) -> None:
    assert tasks.spoken(number) == words


def test_formats_have_one_right_answer_and_an_opposite() -> None:
    for task in tasks.FORMATS:
        pairs = [tasks.pair(task, random.Random(f"{task}{seed}")) for seed in range(50)]
        assert len({response for _, response in pairs}) > 20
        other = [tasks.pair(task, random.Random(f"{task}{seed}"), opposite=True) for seed in range(50)]
        assert [prompt for prompt, _ in pairs] == [prompt for prompt, _ in other]
        assert sum(right != wrong for (_, right), (_, wrong) in zip(pairs, other, strict=True)) > 40
    prompt, response = tasks.pair("dates", random.Random(1))
    assert prompt.endswith(response[:4])


@pytest.mark.slow
def test_a_table_is_made_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_model(tiny_model("llama", num_hidden_layers=2), tmp_path / "m", torch.bfloat16)
    swquant.compress(original, tmp_path / "c", prompt=PROMPT, block="32")
    typed = [
        "continual.py", tmp_path / "c", "--json", tmp_path / "found.json", "--steps", 2, "--train", 8, "--test", 2,
        "--block", 16, "--budget", "1bits", "--window", 48, "--warmup", 1, "--texts", 2,
        "--tasks", "wiki", "dates", "python", "topics", "numbers", "units",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, typed), "--methods", "lw2g", "one"])
    continual.main()
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["lw2g", "one"]
    monkeypatch.setattr(sys, "argv", list(map(str, typed)))
    continual.main()
    out = capsys.readouterr().out
    assert [line.split(" ")[0] for line in out.splitlines()[:3]] == ["grow", "random", "joint"]
    assert all(f"\n| {method} |" in out for method in continual.METHODS)
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["one forward 0"]["sets"] == results["joint forward 0"]["sets"] == 1
    assert results["grow forward 0"]["sets"] == 6
    assert set(results["grow forward 0"]["forgotten"].values()) == {0.0}
    assert results["random forward 0"]["sets"] >= 1
