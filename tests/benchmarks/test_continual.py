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

from swquant.training import data


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


@pytest.fixture
def typed(tmp_path: Path) -> list[str]:
    """What is typed for a small table of a tiny llama at 4 bits."""
    original = save_model(tiny_model("llama", num_hidden_layers=2), tmp_path / "m", torch.bfloat16)
    checkpoint = swquant.compress(original, tmp_path / "c", prompt=PROMPT, block="32").path
    words = [
        "continual.py", checkpoint, "--json", tmp_path / "found.json", "--steps", 2, "--train", 8, "--test", 2,
        "--block", 16, "--budget", "1bits", "--window", 48, "--warmup", 1, "--texts", 2, "--device", "cpu",
    ]  # fmt: skip
    return list(map(str, words))


@pytest.mark.slow
def test_a_table_is_made_row_by_row(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*typed, "--methods", "lw2g", "one"])
    continual.main()
    assert [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["lw2g", "one"]
    monkeypatch.setattr(sys, "argv", typed)
    continual.main()
    out = capsys.readouterr().out
    assert [line.split(" ")[0] for line in out.splitlines()[:4]] == ["grow", "random", "joint", "soft"]
    assert all(f"\n| {method} |" in out for method in continual.METHODS)
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["one forward 0"]["sets"] == results["joint forward 0"]["sets"] == 1
    assert results["grow forward 0"]["sets"] == 6
    assert set(results["grow forward 0"]["forgotten"].values()) == {0.0}
    assert results["random forward 0"]["sets"] >= 1
    files = ["--json", tmp_path / "more.json", tmp_path / "found.json"]
    monkeypatch.setattr(
        sys, "argv", [*typed, *map(str, files), "--orders", "reversed", "--seeds", "1", "--methods", "one"]
    )
    continual.main()
    assert list(json.loads((tmp_path / "more.json").read_text())) == ["settings", "one reversed 1"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["continual.py", "--tables", *map(str, files)])
    continual.main()
    out = capsys.readouterr().out
    assert "| one | " in out
    assert "±" in next(line for line in out.splitlines() if line.startswith("| one"))


@pytest.mark.slow
def test_a_row_runs_on_a_device(
    typed: list[str],
    gpu: torch.device,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(continual, "device_for", lambda _: gpu)
    # texts are written with a cache, which is made in C++, for known devices
    written = torch.randint(2, 90, (2, 48), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(data, "write_text", lambda *_, **__: written)
    monkeypatch.setattr(sys, "argv", [*typed, "--methods", "lw2g", "one", "joint", "soft"])
    continual.main()
    out, problems = capsys.readouterr()
    assert "left out" not in out, problems
    assert [line.split(" ")[0] for line in out.splitlines()[:4]] == ["lw2g", "one", "joint", "soft"]
    results = json.loads((tmp_path / "found.json").read_text())
    assert results["settings"]["device"] == gpu.type
    assert results["lw2g forward 0"]["device"] == f"{gpu} (Pretended GPU)"
    assert set(results["lw2g forward 0"]["again"]) == set(continual.TASKS)
