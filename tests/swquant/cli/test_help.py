"""Help, and what is no usage at all."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import typer
from support.command_line import Cli

import swquant
from swquant.cli import app
from swquant.compress.options import CompressOptions

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_it_does(cli: Cli, command: str) -> None:
    ran = cli(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help, parameter.name
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert not flag.startswith("--") or flag in ran.out


def test_help_of_compress_shows_every_field_of_the_options(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    out = cli("compress", "--help").out
    for option in fields(CompressOptions):
        assert f"--{option.name.replace('_', '-')} " in out
        assert option.metadata["help"] in out


def test_compress_uses_the_defaults_of_the_options() -> None:
    parameters = {item.name: item for item in typer.main.get_command(app).commands["compress"].params}  # type: ignore[attr-defined]
    for option in fields(CompressOptions):
        assert (parameters[option.name].default or ()) == (option.default or ()), option.name


def test_version(cli: Cli) -> None:
    ran = cli("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"swquant {swquant.__version__}\n", "")


def test_no_arguments_show_the_commands(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 2
    assert all(re.search(rf"^.\s+{command}\b", ran.out + ran.err, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [["press"], ["detect"], ["compress", "model", "--bits", "nine"], ["compress", "m", "--no-such"], ["eval", "model"]],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_leaves_stdout_alone(cli: Cli, words: list[str]) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: swquant" in ran.err
