"""optimum-cli, the real one, knows swquant: the same options, messages and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.command_line import Cli, Ran
from support.tiny_models import PROMPT, Planted

import swquant

optimum_cli = pytest.importorskip("optimum.commands.optimum_cli")


@pytest.fixture
def optimum(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "swquant", *map(str, words)])
        capsys.readouterr()
        code: object = 0
        try:
            optimum_cli.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)

    return run


def test_it_has_the_options_of_compress(optimum: Cli) -> None:
    ran = optimum("--help")
    assert ran.code == 0
    assert all(flag in ran.out for flag in ("--bits", "--no-restore", "--outliers", "--graph", "--lm-head-bits"))
    assert "\n  --format" not in ran.out


def test_options_are_handed_on(optimum: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    ran = optimum(
        "-m", planted_llama.folder, tmp_path / "out", "--bits=3", "--dense", "layers.0.", "--dense", "o_proj", "--graph", "dynamo",
        "--asymmetric", "--prompt", PROMPT, "--dry-run", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert (plan["format"], plan["export"]["graph"]) == ("onnx", "dynamo")
    assert plan["options"]["bits"] == 3
    assert plan["options"]["dense"] == ["layers.0.", "o_proj"]
    assert not plan["options"]["symmetric"]


def test_errors_are_swquants(optimum: Cli, compressed: Path, tmp_path: Path) -> None:
    for words, code, problem in (
        (("-m", tmp_path / "nowhere", tmp_path / "out"), 1, "no such folder or file"),
        (("-m", compressed, tmp_path / "out", "--precision", "fp8"), 1, "--precision fp8 is not one of"),
        (("-m", compressed, tmp_path / "out", "--bits", "3"), 2, "No such option: --bits"),  # compressed already
        ((tmp_path / "out",), 2, "required: -m/--model"),
    ):
        ran = optimum(*words)
        assert (ran.code, problem in ran.err) == (code, True), ran.err


@pytest.mark.slow
def test_it_exports(optimum: Cli, compressed: Path, tmp_path: Path) -> None:
    ran = optimum("-m", compressed, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert swquant.verify(tmp_path / "out") == []
