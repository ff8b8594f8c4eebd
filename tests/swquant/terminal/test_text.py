"""Hostile text from files on a console: shown, and never obeyed."""

from __future__ import annotations

import copy
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.command_line import Cli

import swquant
from exporters.json_file import read_json
from swquant.checkpoints.manifest import MANIFEST, write_manifest
from swquant.terminal.console import Terminal
from swquant.terminal.detection import show_detection
from swquant.terminal.formats import view_of
from swquant.terminal.table import short_name
from swquant.terminal.text import marked, marked_sentence, sentence, written

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "[bold]loud[/bold]",
    "[/]",
    "[link=https://example.org]here[/link]",
    "back\\[slash\\",
    "\u202eright to left",
    "\u2066isolate",
    "x" * 10_000,
    "line\nline\r\n",
    "\x9b2J",
    ":fire:",
    "{task.fields[label]}",
    "\ud800",
]
MODEL = "model.layers.1.mlp.up_proj.weight"


def console(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, emoji=False, force_terminal=False)


def text_of(shown: Console) -> str:
    return shown.file.getvalue()  # type: ignore[attr-defined]


def check(text: str) -> None:
    text.encode()
    odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}
    assert not odd, odd


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_word_is_the_same_word_in_markup(hostile: str) -> None:
    for made in (marked(hostile), marked_sentence(hostile), short_name(hostile)):
        shown = console(2000)
        shown.print(f"[bold]before[/] {made} after", soft_wrap=True)
        text = text_of(shown)
        check(text)
        assert text.startswith("before ")
        assert text.endswith(" after\n")
        assert len(text) <= 1600
    assert len(marked("x" * 10_000)) == 300


def strings(value: Any, here: tuple = ()) -> Iterator[tuple]:
    """Where in a manifest there is text."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(inner, (*here, key))
    elif isinstance(value, str):
        yield here


def poisoned(manifest: dict[str, Any], hostile: str) -> dict[str, Any]:
    """A manifest with `hostile` wherever a text may be any, and in the names of tensors."""
    changed = copy.deepcopy(manifest)
    for place in strings(manifest):
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = hostile
    for key in ("kind", "dtype", "scale", "range"):
        for table in ("source", "activations"):
            if isinstance(manifest.get(table), dict) and key in manifest[table]:
                changed[table][key] = manifest[table][key]
    for item in (*changed["detection"]["super_weights"], *changed["detection"]["cancellers"]):
        item["role"] = hostile
    changed["tensors"] = {f"{name}{hostile}": record for name, record in changed["tensors"].items()}
    changed["loaders"] = {f"{name}{hostile}": verdict for name, verdict in changed["loaders"].items()}
    changed["left_out"] = {hostile: hostile}
    changed["notes"] = [hostile]
    return changed


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_inspect_shows_a_hostile_manifest(compressed: Path, hostile: str, width: int) -> None:
    manifest: Any = poisoned(read_json(compressed / MANIFEST), hostile)
    shown = console(width)
    view_of(manifest).inspected(shown, Path(f"/tmp/{hostile}"), manifest)
    check(text_of(shown))
    assert len(text_of(shown)) < 60_000


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_detection_with_hostile_tokens_is_shown(compressed: Path, hostile: str) -> None:
    record: Any = poisoned(read_json(compressed / MANIFEST), hostile)["detection"]
    record["tokens"] = [hostile] * len(record["tokens"])
    shown = console()
    show_detection(shown, hostile, record)
    check(text_of(shown))


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_progress_with_hostile_names_is_shown(hostile: str, terminal: bool) -> None:
    shown = Console(file=io.StringIO(), width=100, highlight=False, emoji=False, force_terminal=terminal)
    progress = Terminal(shown)
    with progress.step(f"Probing {hostile}"):
        progress.note(hostile)
    with progress.bytes(f"Compressing {hostile}", 100) as bar:
        bar.advance(hostile, 50)
        bar.advance(hostile, 50)
    text = text_of(shown)
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    assert "\x1b[1m" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text
    if not terminal:
        check(text)


def test_generated_text_is_whole_and_harmless(cli: Cli, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "one [bold]two[/bold]\n\tthree :fire: \x1b[2J\u202e " + "word " * 2000 + "end"

    def say(*_: object, on_text: Callable[[str], None] | None, **__: object) -> str:
        for start in range(0, len(said), 7) if on_text is not None else ():
            on_text(said[start : start + 7])  # type: ignore[misc]
        return said

    monkeypatch.setattr("swquant.derive.generate", say)
    ran = cli("generate", compressed, "t5")
    assert ran.out == said.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") + "\n"
    check(ran.out.replace("\t", ""))
    assert written(said) == ran.out[:-1]
    exact = cli("generate", compressed, "t5", "--json").out
    check(exact)
    assert json.loads(exact)["text"] == said


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_error_is_one_line_whatever_it_names(cli: Cli, monkeypatch: pytest.MonkeyPatch, hostile: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise swquant.SwquantError(f"{hostile}: is not what it should be; the remedy")

    monkeypatch.setattr("swquant.api.inspect", fail)
    ran = cli("inspect", "folder")
    check(ran.err)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert ran.err.endswith("the remedy\n")
    assert ran.err.count("\n") == 1
    assert len(ran.err) < 1600


def test_verify_names_hostile_files(cli: Cli, damaged: Path) -> None:
    names = [name for name in HOSTILE if len(name) < 200 and "/" not in name and "\ud800" not in name]
    for name in names:
        (damaged / name).write_text("x")
    ran = cli("verify", damaged)
    check(ran.err)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == len(names)


def test_the_prompt_of_a_manifest_is_shown(cli: Cli, damaged: Path) -> None:
    manifest = read_json(damaged / MANIFEST)
    content: Any = {key: value for key, value in manifest.items() if key not in ("format", "version", "digest")}
    content["options"]["prompt"] = "\x1b[2J[bold]" + "y" * 10_000
    write_manifest(damaged, content)
    ran = cli("inspect", damaged)
    assert ran.code == 0
    check(ran.out)
    assert r"\x1b[2J[bold]yyy" in ran.out
    assert len(ran.out) < 10_000


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_no_memory_is_one_message(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("swquant.api.inspect", fail)
    ran = cli("inspect", "folder")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "not enough memory; close other programs" in ran.err


def test_another_runtime_error_is_a_bug_and_stays_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("swquant.api.inspect", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("inspect", "folder")


def test_a_sentence_keeps_its_end() -> None:
    assert sentence("x" * 10_000 + "; the remedy").endswith("; the remedy")
