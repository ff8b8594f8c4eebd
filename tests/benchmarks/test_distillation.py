"""The benchmark of students and mixtures runs end to end, goes on where it stopped, and its models are as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import plant, sample_text, save_model, tiny_model

from swquant.pr_moe import mixtures_of


@pytest.fixture
def table2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import students.table2

    return students.table2


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import students.report

    return students.report


def test_mixtures_have_the_shape_of_the_paper(table2: ModuleType) -> None:
    sizes = {name: table2.weights_of(table2.model_of(kind, 16, 0)) for name, kind in table2.KINDS.items()}
    one = 3 * table2.HIDDEN * table2.NEURONS
    assert {name: size["experts"] // one for name, size in sizes.items()} == {
        "dense": 0, "standard": 64, "residual": 64, "pyramid": 20, "pyramid-residual": 20, "student": 20, "student alone": 20,
    }  # fmt: skip
    assert sizes["dense"]["active"] == sizes["dense"]["parameters"]
    assert sizes["residual"]["active"] - sizes["standard"]["active"] == 4 * (one + 2 * table2.HIDDEN + 2)
    student = table2.model_of(table2.KINDS["student"], 16, 0)
    assert list(mixtures_of(student)) == [f"model.model.layers.{layer}.mlp" for layer in (1, 3, 4, 6)]
    first, second = (expert.down_proj.weight for expert in next(iter(mixtures_of(student).values())).experts[:2])
    assert not torch.equal(first, second)


def test_tables_are_made_of_what_is_there(report: ModuleType, tmp_path: Path) -> None:
    """Half a run has half a table, and curves are drawn of it."""
    cells = {
        f"words {staging} {seed}": {
            "curve": [[0, 3.0], [4, 2.0 + seed]], "before": [3.0, 0.5], "after": [2.0 + seed, 0.25], "until": 4, "seconds": 1.0,
        }
        for staging, seed in (("never", 0), ("never", 1), ("auto", 0))
    }  # fmt: skip
    text = report.TABLES["figure4"](cells)
    assert "| words | never | 2.5000 ± 0.7071 | 0.2500 ± 0.0000 | 4, 4 | 2 | 1 |" in text
    assert "| words | auto | 2.0000 | 0.2500 | 4 | 1 | 1 |" in text
    assert "always" not in text
    assert report.draw(cells, tmp_path / "images").stat().st_size > 1000
    scores = {"words": [1.0, 0.5]}
    rows = {
        "teacher 4": {"bytes": 10, "bits": 3.5, "scores": scores},
        "cut 4": {"bytes": 11, "scores": {"words": [0.5, 0.75]}},
    }
    assert "at 4 bits' bytes: perplexity cut 4, KL teacher 4." in report.TABLES["rival"](rows)


@pytest.mark.slow
def test_every_part_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_model("llama")
    plant(tiny)
    save_model(tiny, tmp_path / "model")
    (tmp_path / "words.txt").write_text(sample_text(900))
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import distillation

    command = [
        "distillation.py", str(tmp_path / "model"), "--json", str(tmp_path / "out.json"), "--folder", str(tmp_path / "kept"),
        "--text", f"words={tmp_path / 'words.txt'}", "--layers", "0-3,last", "--steps", "5", "--window", "16", "--seeds", "1",
        "--scratch", "4", "--experts", "4", "--texts", "2", "--plots", str(tmp_path / "images"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    distillation.main()
    parts = json.loads((tmp_path / "out.json").read_text())
    assert {part: len(parts[part]["cells"]) for part in parts} == {"table2": 7, "figure4": 4, "rival": 6, "super": 11}
    rivals = parts["rival"]["cells"]
    assert rivals["teacher 4"]["bytes"] <= min(rivals[f"{name} 4"]["bytes"] for name in ("cut", "words"))
    assert [weight["role"] for weight in parts["super"]["cells"]["found teacher"]["weights"]][:1] in ([], ["creator"])
    assert (tmp_path / "images/distillation.png").exists()
    first = capsys.readouterr().out
    written = (tmp_path / "out.json").stat().st_mtime_ns
    distillation.main()
    assert (tmp_path / "out.json").stat().st_mtime_ns == written
    again = capsys.readouterr().out
    assert again[again.index("## ") :] == first[first.index("## ") :]
    monkeypatch.setattr(sys, "argv", [*command, "--rate", "0.5", "--parts", "figure4"])
    with pytest.raises(SystemExit, match="other settings"):
        distillation.main()
