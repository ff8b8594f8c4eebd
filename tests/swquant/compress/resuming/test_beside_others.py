"""Interrupted runs and living ones beside each other, and a checkpoint that is there already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interrupted import go_on, left, stopped, stopped_before, tree

import swquant
from swquant.compress import pipeline
from swquant.compress.prepared import Prepared
from swquant.output.destination import unfinished
from swquant.output.resumable import resumable


def test_a_living_run_is_not_disturbed(again: Callable[..., object], tmp_path: Path) -> None:
    with resumable(tmp_path / "out"):
        for changes in ({}, {"fresh": True}):
            with pytest.raises(swquant.SwquantError, match="/out: another run is writing it; wait for that to end"):
                again(**changes)


def test_runs_for_other_places_let_it_be(again: Callable[..., object], whole: dict[str, bytes], tmp_path: Path) -> None:
    with unfinished(tmp_path / "other"), resumable(tmp_path / "third"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [left(tmp_path / "out").name]
    again()
    assert tree(tmp_path / "out") == whole


def test_without_locks_nothing_stays(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swquant.output.resumable.lock", lambda _: None)
    monkeypatch.setattr("swquant.output.hidden.lock", lambda _: None)
    stopped(prepared, tmp_path / "out", 60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_user_put_into_an_exchanged_checkpoint_is_not_deleted(
    prepared: Prepared, half: Path, damaged: Path, tmp_path: Path
) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    old = damaged.rename(left(tmp_path / "out") / "old")
    (old / "mine").write_text("precious")
    with pytest.raises(swquant.SwquantError, match="old/mine: swquant did not put old/mine there; move it elsewhere"):
        pipeline.write(prepared, tmp_path / "out")
    assert (old / "mine").read_text() == "precious"


def test_overwriting_goes_on_too(prepared: Prepared, whole: dict[str, bytes], damaged: Path) -> None:
    stopped_before("check_result", prepared, damaged, overwrite=True)
    assert swquant.verify(damaged) == []
    assert go_on(prepared, damaged, overwrite=True) == len(prepared.plan.tensors)
    assert tree(damaged) == whole


def test_killed_between_the_exchange_and_the_end(prepared: Prepared, whole: dict[str, bytes], damaged: Path) -> None:
    """The old checkpoint lies where the new one was made, and the journal is of the new one still."""
    stopped_before("check_result", prepared, damaged, overwrite=True)
    (made,) = (path for path in left(damaged).iterdir() if path.is_dir())
    aside = made.with_name("aside")
    damaged.rename(aside)
    made.rename(damaged)
    aside.rename(made)
    assert tree(damaged) == whole
    go_on(prepared, damaged, overwrite=True)
    assert tree(damaged) == whole
