"""`swquant detect`: what was found, as a table, as JSON and as a figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, Planted


def test_detect_prints_what_was_found(cli: Cli, planted_llama: Planted) -> None:
    ran = cli("detect", planted_llama.folder, "--prompt", PROMPT)
    assert ran.code == 0
    assert re.search(r"creator\s+1\.mlp\.down_proj\s+37, 101\s+60\s", ran.out)
    assert ran.err == f"Probing {planted_llama.folder.name} with one prompt\n"


def test_detect_json_holds_the_evidence(cli: Cli, planted_llama: Planted) -> None:
    record = document(cli("detect", planted_llama.folder, "--prompt", PROMPT, "--json"))
    (weight,) = record["super_weights"]
    assert (weight["name"], weight["row"], weight["col"], weight["value"]) == (planted_llama.name, 37, 101, 60)
    assert record["model"] == planted_llama.folder.name
    assert record["prompt"] == PROMPT
    assert len(record["layers"]) == 6


def test_detect_on_a_model_without_super_weight_says_so(cli: Cli, control_llama: Path) -> None:
    assert "no super weight" in cli("detect", control_llama, "--prompt", PROMPT).out
    assert document(cli("detect", control_llama, "--prompt", PROMPT, "--json"))["super_weights"] == []


def test_low_memory_finds_the_same(cli: Cli, planted_llama: Planted) -> None:
    words = ("detect", planted_llama.folder, "--prompt", PROMPT, "--json")
    assert document(cli(*words, "--low-memory")) == document(cli(*words))


def test_plot_is_drawn_beside_the_table(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    ran = cli("detect", planted_llama.folder, "--prompt", PROMPT, "--plot", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "37, 101" in ran.out
    assert f"Drew {figure}" in ran.err


@pytest.mark.parametrize(
    ("name", "message"), [("figure.gif", "a plot is .png, .svg or .pdf"), ("no/figure.png", "does not exist")]
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(
    cli: Cli, planted_llama: Planted, tmp_path: Path, name: str, message: str
) -> None:
    ran = cli("detect", planted_llama.folder, "--plot", tmp_path / name)
    assert message in one_line(ran)
    assert "Probing" not in ran.err
