"""No work is done twice, whatever stopped the run before, and none is taken over that belongs to other weights."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.study_world import OPTIONS, World, section, without_super_weight

from swquant.checkpoints.open import open_checkpoint
from swquant.progress import Progress
from swquant.study import measuring
from swquant.study.options import StudyOptions
from swquant.study.pipeline import Study, study_checkpoint


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def again(world: World, out: Path, **changes: Any) -> tuple[Study, list[str]]:
    notes = Notes()
    with open_checkpoint(world.folder) as checkpoint:
        options = StudyOptions(**{**OPTIONS, **changes})
        return study_checkpoint(checkpoint, world.text.read_text(), out, options, progress=notes), notes.notes


def test_a_second_run_measures_what_is_new_only(study: Study, planted: World, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    only = ("importance", "persistence")
    second, notes = again(planted, out, only=only)
    assert notes == []
    assert second.record["sections"] == [section(study, name) for name in only]
    kept = sorted((out / "cache").glob("*.safetensors"))
    for path in kept:
        path.write_bytes(b"damaged")
    third, notes = again(planted, out, only=only)
    assert notes[0].startswith("5 measurements of 144 tokens in 6 windows: about ")
    assert third.record == second.record
    page = (out / "report.html").read_bytes()
    assert again(planted, out, only=only)[1] == []
    assert (out / "report.html").read_bytes() == page


def test_other_weights_under_the_same_header_are_measured_anew(planted: World, study: Study, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    pruned = without_super_weight(planted, tmp_path / "pruned")
    _, notes = again(World(pruned, planted.text, planted.name), out, only=("importance",))
    assert notes[0].startswith("3 measurements of ")


def test_a_stopped_run_keeps_what_it_measured(planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = measuring.Cache.put

    def stop_after_one(self: measuring.Cache, *args: Any) -> None:
        put(self, *args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Cache, "put", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            again(planted, tmp_path / "study", only=("importance",))
    assert {path.name for path in tmp_path.joinpath("study").iterdir()} == {"cache"}
    assert again(planted, tmp_path / "study", only=("importance",))[1][0].startswith("4 measurements of ")


def test_windows_that_do_not_fit_in_memory_together_give_the_same(
    study: Study, planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_MEMORY", 0.0)
    small, _ = again(planted, tmp_path / "study", only=("importance", "stopwords"))
    assert small.record["sections"] == [section(study, "importance"), section(study, "stopwords")]


def test_what_other_options_left_is_removed(study: Study, planted: World, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    again(planted, out, only=("identify",))
    assert {path.name for path in (out / "figures").iterdir()} == {"identify-input.svg", "identify-output.svg"}
    assert {path.name for path in (out / "tables").iterdir()} == {"super-weights.csv", "layers.csv"}
