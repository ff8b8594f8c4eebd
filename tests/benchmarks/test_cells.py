"""benchmarks/cells.py: cells of several processes are read together, and one that fails ends nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.paths import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

from cells import Cells, clock

SETTINGS = {"steps": 2}


def test_cells_go_into_the_first_file_and_all_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    Cells([one], SETTINGS).fill("a", lambda: 1, str)
    cells = Cells([other, one], SETTINGS)
    cells.fill("a", lambda: pytest.fail("is there already"), str)
    cells.fill("b", lambda: 2, str)
    assert cells.all == {"a": 1, "b": 2}
    held = json.loads(other.read_text())
    assert (held["settings"], held["cells"], held["machine"]["device"]) == (SETTINGS, {"b": 2}, "cpu")
    assert Cells([tmp_path / "none.json", one, other], None).all == cells.all
    assert capsys.readouterr().out == "a: 1\nb: 2\n"
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_a_cell_that_fails_is_said_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cells = Cells([tmp_path / "one.json"], SETTINGS)
    cells.fill("a", lambda: 1 / 0, str)
    cells.fill("b", lambda: 2, str)
    said, traced = capsys.readouterr()
    assert said == "a is left out: ZeroDivisionError: division by zero\nb: 2\n"
    assert "Traceback" in traced
    assert Cells([tmp_path / "one.json"], SETTINGS).all == {"b": 2}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Cells([tmp_path / "one.json"], SETTINGS).fill("a", lambda: 1, str)
    with pytest.raises(SystemExit, match=r"one.json holds results of other settings: \{'steps': 2\}"):
        Cells([tmp_path / "two.json", tmp_path / "one.json"], {"steps": 3})


def test_seconds_on_a_gpu_are_those_of_all_work(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert clock(torch.device("cpu")) <= clock(torch.device("cpu"))
    assert waited == []
    assert clock(torch.device("cuda", 0)) > 0
    assert waited == [torch.device("cuda", 0)]
