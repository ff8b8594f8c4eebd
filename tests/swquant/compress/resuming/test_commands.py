"""What the commands say of an interrupted run, and what its journal holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support.interrupted import OPTIONS, Notes, shards, tree
from support.tiny_models import PROMPT, Planted

import swquant
from exporters.safetensors_file import SafetensorsReader
from swquant.output import hidden
from swquant.output.resumable import resumable


def test_dry_run_says_what_is_there(again: Callable[..., object], wide_llama: Planted, tmp_path: Path) -> None:
    plan = swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS, offsets="none")
    assert plan.left.startswith("an interrupted run left ")
    assert plan.left.endswith("tensors, compress goes on from there")
    plan = swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS, bits=4)
    assert "with other options (--bits 8, now 4" in plan.left
    assert plan.left.endswith("compress will ask for --fresh")
    assert swquant.plan(wide_llama.folder, tmp_path / "new", OPTIONS).left == ""
    with resumable(tmp_path / "out"):
        assert swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS).left == "another run is writing OUT"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_onnx_folder_goes_on_from_the_checkpoint(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swquant.export.onnx import pipeline as export

    def run(out: Path, **how: object) -> None:
        swquant.compress(bf16_llama.folder, out, prompt=PROMPT, format="onnx", **how)  # type: ignore[arg-type]

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(export, "check_export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    notes = Notes()
    run(tmp_path / "out", progress=notes)
    assert notes.seen[0] == "Going on: 57 of 57 tensors were there"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_the_journal_is_lines_of_json(half: Path) -> None:
    lines = (half / hidden.JOURNAL).read_text().splitlines()
    head, *steps = [json.loads(line)["entry"] for line in lines]
    assert head["options"]["bits"] == 8
    assert head["tensors"] > len(steps) > 10
    assert set(steps[0]) == {"sha256", "patches", "measured"}
    with closing(SafetensorsReader(shards(half)[0])) as reader:
        assert set(steps[0]["sha256"]) <= set(reader.entries)
