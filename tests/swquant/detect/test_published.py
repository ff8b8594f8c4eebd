"""The published directory: a model of a listed shape is compared, whatever it is called."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command_line import Cli
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.detect import pipeline
from swquant.detect.published import PUBLISHED, Published, published_for

TINY = ("llama", 6, 64, 128, 128)
LISTED = Published("Tiny", TINY, ((1, 37, 101), (3, 5, 7)))


def test_a_listed_shape_is_recognized_and_no_other(planted_llama: Planted) -> None:
    same = Published("Tiny 2", TINY, ((2, 1, 1),))
    others = [Published("?", (*TINY[:index], 999, *TINY[index + 1 :]), ()) for index in range(1, 5)]  # type: ignore[arg-type]
    others.append(Published("?", ("mistral", *TINY[1:]), ()))
    with open_checkpoint(planted_llama.folder) as checkpoint:
        assert published_for(checkpoint, [LISTED, *others, same]) == (LISTED, same)
        assert published_for(checkpoint) == ()


def test_detect_compares_with_what_is_published(
    cli: Cli, planted_llama: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "published_for", lambda checkpoint: published_for(checkpoint, [LISTED]))
    assert swquant.detect(planted_llama.folder, PROMPT).published == (LISTED,)
    out = cli("detect", planted_llama.folder, "--prompt", PROMPT).out
    assert "Published for Tiny, which has this shape; 1 of 2 found here:" in out
    assert re.search(r"layer 1 \[37, 101\]  found\n", out)
    assert re.search(r"layer 3 \[5, 7\]  not found\n", out)


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry.model)
def test_coordinates_lie_inside_the_down_projection(entry: Published) -> None:
    _, layers, hidden, intermediate, _ = entry.shape
    assert entry.coordinates
    assert len(set(entry.coordinates)) == len(entry.coordinates)
    for layer, row, col in entry.coordinates:
        assert 0 <= layer < layers
        assert 0 <= row < hidden
        assert 0 <= col < intermediate


def test_the_papers_examples_are_listed() -> None:
    listed = {entry.model: entry.coordinates for entry in PUBLISHED}
    assert listed["Llama-7B"] == ((2, 3968, 7003),)
    assert listed["Mistral-7B-v0.1"] == ((1, 2070, 7310),)
    assert sum(map(len, listed.values())) == 24


def test_a_copy_under_another_name_is_the_same_shape(planted_llama: Planted, tmp_path: Path) -> None:
    link = tmp_path / "my-finetune"
    link.symlink_to(planted_llama.folder)
    with open_checkpoint(link) as checkpoint:
        assert published_for(checkpoint, [LISTED]) == (LISTED,)
