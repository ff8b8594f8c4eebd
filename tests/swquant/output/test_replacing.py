"""OUT: what may be replaced, and how."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.tiny_models import PROMPT, Planted
from support.written import TEXT, finish, make, names

import swquant
from exporters.json_file import json_bytes
from swquant.checkpoints.manifest import MANIFEST
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import compress_checkpoint
from swquant.output import destination, exchange
from swquant.progress import Progress


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that holds `word` is ours, and nothing else is."""

    def why_not_ours(folder: Path) -> str | None:
        return None if (folder / "word").is_file() and not (folder / "mine").exists() else "is not ours"

    monkeypatch.setattr(destination, "why_not_ours", why_not_ours)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "swquant/mine.json", "sub/deep/file", "link", "empty/"])
def test_a_checkpoint_with_anything_else_in_it_is_not_replaced(bf16_llama: Planted, damaged: Path, name: str) -> None:
    path = damaged / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "link":
        path.symlink_to(damaged.parent)
    elif name.endswith("/"):
        path.mkdir()
    else:
        path.write_text(TEXT)
    with pytest.raises(swquant.SwquantError, match=f"holds {name}, which swquant did not put there; move that"):
        swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT, overwrite=True)
    assert os.path.lexists(path)
    assert names(damaged.parent) == {"damaged"}


@pytest.mark.parametrize(
    "change", [lambda data: data[:-30], lambda data: b"{}", lambda data: data.replace(b"4", b"5", 1)]
)
def test_a_folder_whose_manifest_cannot_be_relied_on_is_not_replaced(
    bf16_llama: Planted, damaged: Path, change: Callable[[bytes], bytes]
) -> None:
    (damaged / MANIFEST).write_bytes(change((damaged / MANIFEST).read_bytes()))
    with pytest.raises(swquant.SwquantError, match=r"its swquant/manifest.json cannot be relied on .* move it away"):
        swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT, overwrite=True)
    assert (damaged / "config.json").is_file()


def test_a_file_put_into_out_while_the_result_was_made_stops_the_replacing(damaged: Path) -> None:
    before = (damaged / MANIFEST).read_bytes()
    with pytest.raises(swquant.SwquantError, match="holds mine, which swquant did not put there"):
        finish(damaged, "new", meanwhile=lambda: (damaged / "mine").write_text(TEXT))
    assert (damaged / "mine").read_text() == TEXT
    assert (damaged / MANIFEST).read_bytes() == before
    assert names(damaged.parent) == {"damaged"}


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "two renames"])
def test_a_file_put_into_out_at_the_last_moment_is_found_before_it_is_deleted(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "exchange", lambda *_: False)
    swap = destination.swap

    def intruding(folder: Path, out: Path) -> Path:
        (out / "mine").write_text(TEXT)
        return swap(folder, out)

    monkeypatch.setattr(destination, "swap", intruding)
    before = (damaged / MANIFEST).read_bytes()
    with pytest.raises(swquant.SwquantError, match="holds mine"):
        finish(damaged, "new")
    assert (damaged / "mine").read_text() == TEXT
    assert (damaged / MANIFEST).read_bytes() == before
    assert names(damaged.parent) == {"damaged"}


def test_two_folders_are_exchanged_at_once_or_it_says_that_it_cannot(tmp_path: Path) -> None:
    make(tmp_path / "a", "a")
    make(tmp_path / "b", "b")
    if not exchange.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot exchange two names")
    assert (tmp_path / "a" / "word").read_text() == "b"
    assert (tmp_path / "b" / "word").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange.exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.usefixtures("simple")
@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "two renames"])
def test_there_is_an_out_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "exchange", lambda *_: False)
    out, stop, seen = tmp_path / "out", threading.Event(), {True: 0, False: 0}
    finish(out, "0")

    def watch() -> None:
        while not stop.is_set():
            seen[(out / "word").is_file()] += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    for count in range(100):
        finish(out, str(count))
    stop.set()
    watcher.join()
    assert seen[True]
    assert seen[False] == 0 or not at_once
    assert (out / "word").read_text() == "99"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.usefixtures("simple")
def test_a_failure_between_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    finish(out, "old")
    monkeypatch.setattr(exchange, "exchange", lambda *_: False)
    calls: list[Path] = []
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(swquant.SwquantError, match=rf"^{out}: cannot be written .*; give another OUT$"):
        finish(out, "new")
    assert (out / "word").read_text() == "old"
    assert names(tmp_path) == {"out"}


@pytest.mark.usefixtures("simple")
def test_many_runs_at_once_with_overwrite_leave_one_whole_result(tmp_path: Path) -> None:
    out, errors = tmp_path / "out", []

    def run(word: str) -> None:
        try:
            for _ in range(5):
                finish(out, word)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(str(index),)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (out / "word").read_text() in "012345"
    assert names(tmp_path) == {"out"}


class Second(Progress):
    """A second run into the same OUT, while the first verifies its result: it is refused at once."""

    def __init__(self, model: Path, out: Path) -> None:
        self.model, self.out, self.refused = model, out, 0

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        if text.startswith("Verifying"):
            with pytest.raises(swquant.SwquantError, match="another run is writing it; wait for that to end"):
                swquant.compress(self.model, self.out, prompt=PROMPT, preset="fast", bits=8)
            self.refused += 1
        yield


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_at_once_into_the_same_out(bf16_llama: Planted, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    options = CompressOptions(prompt=PROMPT, preset="fast", bits=4)
    second = Second(bf16_llama.folder, out)
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        compress_checkpoint(checkpoint, out, options, overwrite=overwrite, progress=second)
    assert swquant.verify(out) == []
    assert swquant.inspect(out)["options"]["bits"] == 4
    assert names(tmp_path) == {"out"}
    assert second.refused == 1


def test_the_manifest_of_these_tests_is_canonical(compressed: Path) -> None:
    import json

    assert json_bytes(json.loads((compressed / MANIFEST).read_bytes())) == (compressed / MANIFEST).read_bytes()
