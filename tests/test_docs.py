"""README.md and docs/ are true: every code block is run or checked, every link leads somewhere, no option is made up.

Each block runs in a folder of its own that holds what the documents talk about: `model`, a tiny one with a super
weight, `text.txt`, the project's scripts, and the checkpoints that a block uses but does not make. Commands run in this
process, since a new one waits seconds for torch; the scripts run in a real shell.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
import typer
import yaml
from support.command_line import Cli
from support.gguf_models import PROMPT, save_gguf_model
from support.paths import PROJECT
from support.tiny_models import plant, sample_text, save_model, save_tokenizer, tiny_model

import swquant
from swquant.cli import app
from swquant.compress.options import CompressOptions

DOCUMENTS = (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
# The default prompt, as the words that the super weight is planted for (tiny_models.PROMPT).
WORDS = {"Apple": 5, "Inc": 9, ".": 17, "is": 33, "a": 64, "worldwide": 2, "tech": 81, "company": 40, "capital": 11}
CHECKPOINTS = ("out", "model-w4")


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a document; line is that of its first line of code."""

    path: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(PROJECT).as_posix()}:{self.line}"


def code_blocks(path: Path) -> list[CodeBlock]:
    blocks = []
    inside: list[str] | None = None
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.startswith("```") and inside is None:
            language, start, inside = line[3:].strip(), number + 1, []
        elif line.startswith("```"):
            blocks.append(CodeBlock(path, start, language, "\n".join(inside or ())))
            inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{path.name}: a code block is not closed"
    return blocks


BLOCKS = [block for path in DOCUMENTS for block in code_blocks(path)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that blocks run in copies of."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model(
        "llama", intermediate_size=256
    )  # genai's builder takes a layer of 128, as many as words, for the head
    plant(model)
    save_model(model, folder / "model")
    save_tokenizer(folder / "model", WORDS)
    (folder / "text.txt").write_text(sample_text(300))
    shutil.copytree(PROJECT / "tools", folder / "tools")
    shutil.copytree(PROJECT / "data", folder / "data")
    shutil.copy(PROJECT / "constraints.txt", folder)
    for name in CHECKPOINTS:
        swquant.compress(folder / "model", folder / name)
    return folder


@pytest.fixture(scope="session")
def exported(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What blocks call `model-onnx`, for those that do not make it."""
    folder = tmp_path_factory.mktemp("exported") / "model-onnx"
    return swquant.export(world / "out", folder, graph="genai", accuracy_level=4, lm_head_bits=8).path


@pytest.fixture(scope="session")
def gguf_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and `out` for blocks about GGUF files: a vocabulary and rows that these can hold."""
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf_model("llama", folder / "model", torch.bfloat16)
    swquant.compress(folder / "model", folder / "out", prompt=PROMPT)
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(world, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def commands(code: str) -> list[list[str]]:
    """The words of every command of a shell block; comments and empty lines are none."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert words[1:], "make without a target"
    assert set(words[1:]) <= set(targets)


def check_pip(words: list[str]) -> None:
    """`pip install [-e] [-c FILE] .[EXTRA]`: of this project, with files and extras that exist."""
    assert words[1] == "install"
    rest = [word for word in words[2:] if word != "-e"]
    if rest[0] == "-c":
        assert (PROJECT / rest[1]).is_file()
        rest = rest[2:]
    assert len(rest) == 1
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", rest[0])
    assert match, f"{rest[0]} is not this project"
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert match[1] is None or match[1] in extras


def check_script(words: list[str]) -> None:
    script = PROJECT / words[0]
    assert script.is_file()
    assert os.access(script, os.X_OK)
    for word in words[1:]:
        if word.startswith(("data/", "tools/")):
            assert (PROJECT / word).is_file()


def run_script(words: list[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", shlex.join(words)], env={**os.environ, "PATH": path}, check=True)


def run_shell(code: str, here: Path, cli: Cli) -> None:
    for words in commands(code):
        match words[0]:
            case "swquant":
                ran = cli(*words[1:])
                assert ran.code == 0, (words, ran.err)
                assert ran.out.strip(), f"{words} says nothing"
            case "make":
                check_make(words)
            case "pip":
                check_pip(words)
            case name if name.startswith("tools/"):
                check_script(words)
                run_script(words)
            case name:
                pytest.fail(f"nobody knows how to run or check {name!r}")


def check_workflow(code: str) -> None:
    """A workflow for GitHub: it parses, and its own steps name what exists."""
    workflow = yaml.safe_load(code)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    for step in steps:
        for words in commands(step.get("run", "")):
            match words[0]:
                case "pip":
                    check_pip(words)
                case "hf":
                    assert "hf" in distribution("huggingface-hub").entry_points.names
                case _:
                    check_script(words)


def check_javascript(code: str, here: Path) -> None:
    """It parses; `make test-js` runs it."""
    (here / "example.mjs").write_text(code)
    if (node := shutil.which("node")) is None:
        pytest.skip("needs node")
    subprocess.run([node, "--check", "example.mjs"], cwd=here, check=True)


def test_the_documents_have_blocks() -> None:
    assert len(BLOCKS) > 10
    assert {block.language for block in BLOCKS} >= {"bash", "python", "json", "yaml"}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language != "text"], ids=str)
def test_a_block_does_what_it_says(block: CodeBlock, here: Path, cli: Cli, request: pytest.FixtureRequest) -> None:
    if "model-onnx" in block.code and not re.search(r"(compress|export)\b.*\bmodel-onnx\b", block.code):
        shutil.copytree(request.getfixturevalue("exported"), here / "model-onnx")
    if ".gguf" in block.code:
        for name in ("model", "out"):
            shutil.rmtree(here / name)
            shutil.copytree(request.getfixturevalue("gguf_world") / name, here / name)
    for name in CHECKPOINTS:
        if re.search(rf"compress\b.*\bmodel\b.*\b{name}\b", block.code):
            shutil.rmtree(here / name)  # the block makes it
    match block.language:
        case "bash":
            run_shell(block.code, here, cli)
        case "python":
            exec(compile(block.code, str(block), "exec"), {"__name__": "example"})
        case "json":
            json.loads(block.code)
        case "yaml":
            check_workflow(block.code)
        case "js":
            check_javascript(block.code, here)
        case language:
            pytest.fail(f"{block}: nobody can run a block of {language!r}; tag it `text` if it is none")


def test_the_model_of_the_examples_has_a_super_weight(here: Path) -> None:
    """Otherwise the loops of the examples run over nothing."""
    assert [(w.layer, w.row, w.col) for w in swquant.detect("model").detection.super_weights] == [(1, 37, 101)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def parameters() -> dict[str, dict[str, object]]:
    """command -> its options, as typer knows them."""
    group = typer.main.get_command(app)
    return {
        name: {
            flag: item
            for item in command.params
            for flag in (*item.opts, *item.secondary_opts)
            if flag.startswith("--")
        }
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


OF_LAUNCHERS = {"--multi-gpu", "--nproc-per-node", "--num-processes"}  # torchrun, accelerate launch


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_option_is_made_up(path: Path) -> None:
    root = {flag for item in typer.main.get_command(app).params for flag in item.opts}
    known = {flag for options in parameters().values() for flag in options} | root | OF_LAUNCHERS | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text())) <= known


def test_every_command_and_every_option_is_in_the_reference() -> None:
    reference = (PROJECT / "docs" / "commands.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(parameters())
    preface = reference[: reference.index("## ")]
    for name, options in parameters().items():
        for flag in options:
            assert f"`{flag}" in sections[name] or f"{flag}`" in sections[name] or f"`{flag}`" in preface, (name, flag)


def test_the_reference_describes_the_options_of_compress_as_help_does() -> None:
    reference = (PROJECT / "docs" / "commands.md").read_text()
    for option in fields(CompressOptions):
        assert str(option.metadata["help"]) in reference, option.name
