"""What an interrupted run left of other work is named, and nothing of it is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.interrupted import OPTIONS, Notes, flip, left, tree
from support.tiny_models import Planted

import swquant
from swquant.compress import pipeline, resuming
from swquant.compress.prepared import Prepared


def test_the_same_command_goes_on(again: Callable[..., object], whole: dict[str, bytes], tmp_path: Path) -> None:
    notes = Notes()
    again(progress=notes)
    assert notes.seen[0].startswith("Going on: ")
    assert tree(tmp_path / "out") == whole


def refused(again: Callable[..., object], tmp_path: Path, words: str, **changes: object) -> None:
    before = tree(tmp_path)
    with pytest.raises(swquant.SwquantError, match=f"/out: .*{words}.*--fresh starts over, or give another OUT"):
        again(**changes)
    assert tree(tmp_path) == before


def test_other_options_are_named_and_lose_nothing(again: Callable[..., object], tmp_path: Path) -> None:
    words = r"left \d+ of \d+ tensors, with other options \(--bits 8, now 4, --seed 0, now 1\)"
    refused(again, tmp_path, words, bits=4, seed=1)


def test_they_are_found_before_the_prompt_is_run(
    again: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prepare", None)  # would be a TypeError if it came that far
    refused(again, tmp_path, "other options", bits=4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("__version__", "0.0.1", "swquant 0"),
        ("machine", lambda: {"processor": "abacus", "torch": "1", "numba": "1"}, "processor .*, now abacus"),
    ],
)
def test_another_version_or_processor(
    again: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str
) -> None:
    monkeypatch.setattr(resuming, name, value)
    refused(again, tmp_path, words)


def test_another_model_of_the_same_form(half: Path, wide_llama: Planted, tmp_path: Path) -> None:
    """Equal headers, equal names, other weights: what a training run overwrites every hour."""
    model = Path(shutil.copytree(wide_llama.folder, tmp_path / wide_llama.folder.name))
    shutil.copytree(half, left(tmp_path / "out"))
    flip(next(model.glob("*.safetensors")), -1)
    with pytest.raises(swquant.SwquantError, match="a source whose files were changed since; --fresh"):
        swquant.compress(model, tmp_path / "out", replace(OPTIONS, offsets="none"))


def test_another_model(half: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    with pytest.raises(swquant.SwquantError, match=r"another source \(wide\); --fresh"):
        swquant.compress(bf16_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"))
    swquant.compress(bf16_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"), fresh=True)
    assert swquant.verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_evidence_makes_another_plan(prepared: Prepared, half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    name = prepared.plan.quantized[0].name
    record = prepared.found.record(name)
    assert record is not None
    energy = record.energy.clone()
    record.energy[0] *= 1.0001
    try:
        with pytest.raises(swquant.SwquantError, match="another plan; --fresh"):
            pipeline.write(prepared, tmp_path / "out")
    finally:
        record.energy.copy_(energy)
