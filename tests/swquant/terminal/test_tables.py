"""Tables: nothing is cut off, whatever the width, and what is printed can be typed again."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.command_line import Cli
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.evaluate.pipeline import Evaluation
from swquant.terminal.detection import show_detection
from swquant.terminal.evaluation import show_evaluation
from swquant.terminal.manifest import show_manifest

WEIGHT = {
    "name": "model.layers.47.mlp.experts.127.down_proj.weight", "role": "companion", "layer": 47, "row": 25633, "col": 112817,
    "value": -5.875, "input": -123456.7, "output": -245678.9, "share": 0.994, "kl": 0.000123,
}  # fmt: skip
RECORD: dict[str, Any] = {
    "super_weights": [WEIGHT],
    "cancellers": [{**WEIGHT, "role": "canceller", "col": 112818}],
    "super_activations": [
        {"channel": 25633, "token": 0, "value": -24058.4, "born": 11, "gone": 28},
        {"channel": 163, "token": 1, "value": 1.5, "born": 4, "gone": None},
    ],
    "tokens": ["<bos>", "[red]"],
    "layers": [],
    "published": [],
}  # fmt: skip


def printed(show: Callable[[Console], None], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_numbers_are_whole_at_every_width(width: int) -> None:
    text = printed(lambda console: show_detection(console, "model", RECORD), width)
    for number in ("25633, 112817", "25633, 112818", "-123,457", "-245,679", "-5.88", "99%", "0.000123", "companion"):
        assert number in text
    assert re.search(r"25633\s+0 '<bos>'\s+-24,058\s+11\s+28", text)
    assert re.search(r"163\s+1 '\[red\]'\s+1.5\s+4\s+the end", text)
    assert max(map(len, text.splitlines())) <= max(80, width)
    name = "".join(line[12:30].split(" ")[0] for line in text.splitlines() if width >= 100 and "companion" in line)
    assert width < 100 or name == "47.mlp.experts.127"


def test_a_model_without_anything_to_show_says_so() -> None:
    nothing = {**RECORD, "super_weights": [], "cancellers": [], "super_activations": []}
    assert (
        printed(lambda console: show_detection(console, "[m]", nothing), 80)
        == "[m] has no super weight on this prompt.\n"
    )
    peak = {"layer": 3, "output": 41.84, "output_channel": 7}
    text = printed(lambda console: show_detection(console, "m", {**nothing, "layers": [peak]}), 80)
    assert "41.84 (layer 3, channel 7)" in text


def test_the_options_that_inspect_prints_can_be_typed_again(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    given = ["--bits", "3", "--block", "32x16", "--asymmetric", "--clip", "z=4", "--outliers", "0.01", "--strict-block"]
    given += ["--dense", "*.q_proj.*", "--dense", "layers.0.", "--dtype", "float16", "--prompt", PROMPT]
    assert cli("compress", planted_llama.folder, tmp_path / "a", *given).code == 0
    manifest = swquant.inspect(tmp_path / "a")
    text = printed(lambda console: show_manifest(console, tmp_path / "a", manifest), 10_000)
    typed = shlex.split(re.search(r"^Options: (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert cli("compress", planted_llama.folder, tmp_path / "b", *typed).code == 0
    assert swquant.inspect(tmp_path / "b") == manifest


def test_inspect_says_why_a_super_weight_is_kept(planted_llama: Planted, tmp_path: Path) -> None:
    kept = {
        "both": ({}, "block, sidecar"), "block": ({"restore": False}, "block"), "dense": ({"block": "tensor"}, "dense tensor"),
    }  # fmt: skip
    for name, (options, words) in kept.items():
        swquant.compress(planted_llama.folder, tmp_path / name, prompt=PROMPT, **options)
        manifest = swquant.inspect(tmp_path / name)
        text = printed(lambda console, m=manifest: show_manifest(console, tmp_path, m), 100)
        assert re.search(rf"1\.mlp\.down_proj +37, 101 +60 +60 +[\d.e-]+ +{words} *\n", text), name


@pytest.mark.parametrize(
    ("evaluation", "shown", "hidden"),
    [
        (Evaluation(23.45678, 2044, 4), ["23.4568", "2,044 in 4 windows"], ["original", "acceptance"]),
        (Evaluation(float("inf"), 1, 1), ["inf", "1 in 1 window "], []),
        (Evaluation(31.8, 9, 1, 0.36027, 0.6932, 0.7512, 25.4942), ["25.4942", "0.36027", "69.32%", "75.12%"], []),
    ],
)
def test_an_evaluation_is_shown_with_its_digits(evaluation: Evaluation, shown: list[str], hidden: list[str]) -> None:
    text = printed(lambda console: show_evaluation(console, evaluation), 80)
    assert all(word in text for word in shown)
    assert not any(word in text for word in hidden)
