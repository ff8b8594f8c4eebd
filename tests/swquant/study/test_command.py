"""`swquant study`, the command, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import Cli
from support.study_world import OPTIONS, PROMPT, WINDOW, World, without_super_weight

import swquant
from exporters.errors import SwquantError
from swquant.study.options import EXPERIMENTS


def test_the_command_says_what_was_found_and_where(
    cli: Cli, planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["study", planted.folder, "--text", planted.text, "--prompt", PROMPT, "--only", "identify"]
    ran = cli(*words, "--window", WINDOW, "--limit", 2)
    assert ran.code == 0
    assert "1 found: layers[1] [37, 101]" in ran.out
    assert "Report: model-study/report.html" in ran.out
    ran = cli(*words, "--window", WINDOW, "--quick", "--only", "stopwords", "--json", "--out", "other")
    assert (ran.code, ran.err) == (0, "")
    record = json.loads(ran.out)
    assert [item["name"] for item in record["sections"]] == ["identify", "stopwords"]
    assert record["text"] == {"name": "text.txt", "windows": 4, "window": WINDOW, "tokens": 4 * WINDOW}


def refusal(planted: World, out: Path, text: str | None = None, **options: Any) -> str:
    text = planted.text.read_text() if text is None else text
    with pytest.raises(SwquantError) as caught:
        swquant.study(planted.folder, text, out, **{**OPTIONS, **options})
    return str(caught.value)


def test_bad_input_is_one_message(planted: World, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert refusal(planted, out, only=("identify", "magic")) == (
        f"experiment 'magic' is not one of: {', '.join(EXPERIMENTS)}"
    )
    assert refusal(planted, out, bits=9).startswith("bits 9 is outside 2 to 8")
    short = refusal(planted, out, text="w009 w017 w033 w064 w002 w009 w017 w033")
    assert short == "the text has 8 tokens, less than one window of 24; give a longer text, or --window 2"
    assert "too few to predict any" in refusal(planted, out, text="")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert (
        refusal(planted, tmp_path / "mine")
        == f"{tmp_path / 'mine'}: exists already and is no study; give another --out"
    )
    assert refusal(planted, tmp_path / "mine" / "thesis.txt").endswith(
        "exists already and is no study; give another --out"
    )


def test_a_damaged_model_is_one_message(planted: World, tmp_path: Path) -> None:
    broken = without_super_weight(planted, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SwquantError, match="NaN or infinite"):
        swquant.study(broken, planted.text.read_text(), tmp_path / "study", **OPTIONS)


def test_a_full_disk_is_one_message(planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("swquant.output.destination.shutil.disk_usage", lambda _: full)
    assert re.search(r"no space left; 0\.00 GB are needed", refusal(planted, tmp_path / "study"))


def test_a_model_that_does_not_fit_twice_is_refused(
    planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.models.memory.available_memory", lambda: 1000)
    assert "holds the model twice in float32, 1.9 MB" in refusal(planted, tmp_path / "study")
