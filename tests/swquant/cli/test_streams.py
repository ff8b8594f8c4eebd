"""What is on which stream: terminals, logs, pipes, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.command_line import Cli, one_line
from support.tiny_models import PROMPT, Planted


def test_progress_is_plain_lines_in_a_log(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    ran = cli("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT)
    first, second, *tenths, last = ran.err.splitlines()
    assert first == f"Probing {planted_llama.folder.name} with one prompt"
    assert second == "Rehearsing how stock transformers loads it"
    assert last == "Verifying every byte"
    assert tenths
    pattern = r"Compressing \d+ %, [\d.]+ [kM]?B of [\d.]+ [kM]B, [\d.]+ [kMG]?B/s, \d+ s left"
    assert all(re.fullmatch(pattern, line) for line in tenths), tenths
    assert tenths[-1].startswith("Compressing 100 %")
    assert "\x1b" not in ran.out + ran.err


def test_a_terminal_gets_bars_and_colours(
    cli: Cli, planted_llama: Planted, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("out", "err"):
        console = Console(
            stderr=name == "err", highlight=False, force_terminal=True, width=80, color_system="truecolor"
        )
        for module in [module for key, module in sys.modules.items() if key.startswith("swquant.cli.")]:
            monkeypatch.setattr(module, name, console, raising=False)
    out = tmp_path / "out"
    ran = cli("compress", planted_llama.folder, out, "--prompt", PROMPT)
    assert ran.code == 0
    assert "\x1b[1;32mWrote" in ran.out
    assert "Compressing" in ran.err
    assert "Probing" in ran.err
    ran = cli("eval", out, "--text", text, "--window", "10")
    assert ran.code == 0
    assert "Evaluating" in ran.err
    ran = cli("verify", tmp_path)
    assert ran.code == 1
    assert "\x1b[1;31merror:\x1b[0m" in ran.err


def test_a_reader_that_goes_away_is_no_traceback(compressed: Path) -> None:
    """`swquant inspect OUT --json | head -1`, in a real pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "swquant", "inspect", str(compressed), "--json"]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ran.returncode == 1
    assert ran.stderr == ""


def test_a_name_that_looks_like_markup_is_printed_as_it_is(cli: Cli, control_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(control_llama, tmp_path / "tiny [red]"))
    out = tmp_path / "out [bold]x"
    ran = cli("compress", folder, out, "--prompt", PROMPT)
    assert "tiny [red] has no super weight" in ran.out
    assert f"Wrote {out}:" in ran.out
    assert "Probing tiny [red] with one prompt" in ran.err
    assert f"{out}: " in cli("verify", out).out
    assert "[bold]x" in cli("inspect", out).out
    assert "[bold]y" in one_line(cli("verify", tmp_path / "[bold]y"))


@pytest.mark.parametrize("command", ["detect", "compress", "inspect", "verify", "eval", "generate"])
def test_a_model_that_is_not_there_is_one_line(cli: Cli, tmp_path: Path, text: Path, command: str) -> None:
    more = {"eval": ["--text", text], "generate": ["t5"]}.get(command, [])
    line = one_line(cli(command, tmp_path / "nothing here", *more))
    assert "nothing here" in line


def test_an_operating_system_error_is_one_line(cli: Cli, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("swquant.output.verification.verify", refuse)
    assert one_line(cli("verify", compressed)) == "error: model.safetensors: Permission denied"
