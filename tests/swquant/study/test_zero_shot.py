"""`study --tasks`: lm-eval on the changed models, with data of this machine only, or one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.study_world import OPTIONS, World

import swquant
from exporters.errors import SwquantError
from swquant.study.options import StudyOptions

ONLY: dict[str, Any] = {**OPTIONS, "only": ("identify",)}


@pytest.fixture(scope="module")
def harness() -> None:
    pytest.importorskip("lm_eval", reason="the extra `tasks` is not installed")


@pytest.fixture(scope="module")
def task(planted: World) -> Path:
    """Which of two words goes on: the one that the model itself wrote, or one that it never writes."""
    folder = planted.text.parent / "tasks"
    folder.mkdir()
    words = planted.text.read_text().split()
    rows = [
        {"text": " ".join(words[start : start + 8]), "choices": [words[start + 8], "w001"], "label": 0}
        for start in range(0, 8 * 12, 8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        "task: own_words\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder / "own.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("harness")
def test_an_own_task_is_asked_of_every_model(planted: World, task: Path, tmp_path: Path) -> None:
    study = swquant.study(planted.folder, planted.text.read_text(), tmp_path / "study", tasks=(str(task),), **ONLY)
    section = study.record["sections"][-1]
    rows = section["tables"]["zero-shot"]
    assert [row["model"] for row in rows][:2] == ["original", "super weights pruned"]
    original = rows[0]["own_words, acc"]
    assert original["value"] > 0.7  # it wrote the right answers itself
    assert original["low"] <= original["value"] <= original["high"]
    assert rows[0]["mean"] == pytest.approx(original["value"])
    assert "Zero-shot tasks" in (study.path / "report.html").read_text()
    assert (study.path / "tables" / "zero-shot.csv").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("harness")
def test_what_cannot_be_asked_is_one_message(planted: World, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("dataset_path: json\n")
    for name, message in (
        ("no_such_task_at_all", "is not a task of lm-eval"),
        (str(tmp_path / "none.yaml"), "no such file"),
        (str(tmp_path / "bad.yaml"), "it has no `task`"),
        ("arc_easy", "--download lets lm-eval fetch it"),  # its data is not here, and nothing is fetched by itself
    ):
        with pytest.raises(SwquantError, match=message):
            swquant.study(planted.folder, planted.text.read_text(), tmp_path / "study", tasks=(name,), **ONLY)


def test_options_without_a_task_are_refused() -> None:
    with pytest.raises(SwquantError, match="name one with --tasks"):
        StudyOptions(download=True)
    with pytest.raises(SwquantError, match="a limit of 0 questions"):
        StudyOptions(tasks=("arc_easy",), task_limit=0)
