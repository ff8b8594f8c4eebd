"""OUT: what may be replaced, how, and what runs that died left beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.paths import PROJECT
from support.tiny_models import PROMPT, Planted

import swquant
from exporters.json_file import json_bytes
from swquant.checkpoints.manifest import MANIFEST
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import compress_checkpoint
from swquant.interrupts import sigterm_interrupts, uninterrupted
from swquant.output import destination, exchange, hidden
from swquant.output.destination import check_destination, replace, unfinished, write_whole, writing
from swquant.progress import Progress

TEXT = "precious"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finish(out: Path, word: str, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """What a run with --overwrite does with OUT, without the run."""
    with writing(out), unfinished(out) as folder:
        make(folder, word)
        meanwhile()
        replace(folder, out, overwrite=True)


def make(folder: Path, word: str) -> None:
    """A folder that passes for a checkpoint when it is asked whose it is."""
    (folder / "swquant").mkdir(parents=True)
    (folder / "word").write_text(word)


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that holds `word` is ours, and nothing else is."""

    def why_not_ours(folder: Path) -> str | None:
        return None if (folder / "word").is_file() and not (folder / "mine").exists() else "is not ours"

    monkeypatch.setattr(destination, "why_not_ours", why_not_ours)


# Replacing


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


# What dead runs left


def leave(folder: Path, name: str = ".other.partial-0123abcd") -> Path:
    dead = folder / name
    (dead / "sub").mkdir(parents=True)
    (dead / "sub" / "weights").write_bytes(b"0" * 100)
    return dead


def test_what_a_dead_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    leave(tmp_path)
    leave(tmp_path, ".out.partial-ffffffff")
    (tmp_path / ".study.json.partial-00000000").write_text("half")
    finish(tmp_path / "out", "new")
    assert names(tmp_path) == {"out"}


def test_what_a_living_run_makes_is_left_to_it(tmp_path: Path) -> None:
    with unfinished(tmp_path / "out") as living, hidden.locked_file(tmp_path / "table.json") as (file, _):
        (living / "weights").write_text("half")
        finish(tmp_path / "other", "new")
        assert (living / "weights").is_file()
        assert file.is_file()
    assert names(tmp_path) == {"other"}


@pytest.mark.parametrize(
    "name",
    ["out.partial-01234567", ".out.partial", ".out.partial-0123456", ".out.partial-0123456g", ".out.part-01234567"],
)
def test_other_names_are_not_ours(tmp_path: Path, name: str) -> None:
    leave(tmp_path, name)
    finish(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", name}


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    make(target, TEXT)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / ".out.partial-01234567").symlink_to(target)
    finish(tmp_path / "beside" / "out", "new")
    assert (target / "word").read_text() == TEXT


def test_what_belongs_to_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = leave(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    finish(tmp_path / "out", "new")
    assert dead.is_dir()


def test_without_locks_nobody_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says")

    monkeypatch.setattr(fcntl, "flock", none)
    dead = leave(tmp_path)
    finish(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", dead.name}


def test_an_old_checkpoint_that_was_moved_aside_gets_its_name_back(damaged: Path) -> None:
    damaged.rename(damaged.with_name(".damaged.replaced-01234567"))
    finish(damaged.parent / "other", "new")
    assert swquant.verify(damaged) == []
    assert names(damaged.parent) == {"damaged", "other"}


def test_it_is_deleted_where_the_new_one_has_the_name(damaged: Path, tmp_path: Path) -> None:
    shutil.copytree(damaged, damaged.with_name(".damaged.replaced-01234567"))
    finish(damaged.parent / "other", "new")
    assert names(damaged.parent) == {"damaged", "other"}


def test_a_replaced_checkpoint_with_something_else_in_it_stays(damaged: Path) -> None:
    aside = damaged.rename(damaged.with_name(".damaged.partial-01234567"))
    (aside / "mine").write_text(TEXT)
    finish(damaged.parent / "other", "new")
    assert (aside / "mine").read_text() == TEXT


# Before the work


def mounted(folder: Path) -> bool:
    return subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode == 0


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "volume (1)"
    folder.mkdir()
    if shutil.which("mount") is None or not mounted(folder):
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_mount_point_is_refused_before_the_work(
    bf16_llama: Planted, mount_point: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    monkeypatch.setattr(pipeline, "prepare", None)  # would be a TypeError if it came that far
    with pytest.raises(swquant.SwquantError, match=r"a mount point, .*; give .*/NAME as OUT"):
        swquant.compress(bf16_llama.folder, mount_point, prompt=PROMPT, overwrite=overwrite)
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        check_destination(mount_point / "NAME", False, checkpoint)


def test_a_companion_that_cannot_be_read_is_found_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    original = builtins.open

    def guarded(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith("generation_config.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *args, **kwargs)  # type: ignore[call-overload]

    with open_checkpoint(source) as checkpoint:
        monkeypatch.setattr(builtins, "open", guarded)
        with pytest.raises(
            swquant.SwquantError, match=r"generation_config.json cannot be read \(Permission denied\); make it"
        ):
            check_destination(tmp_path / "out", False, checkpoint)


def test_too_little_memory_is_known_before_a_weight_is_read(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swquant.models.memory.available_memory", lambda: 1000)
    monkeypatch.setattr("psutil.swap_memory", lambda: type("Swap", (), {"free": 0}))
    with pytest.raises(swquant.SwquantError, match=r"takes .* of memory, 1.0 kB are free; close other programs"):
        swquant.load(compressed)


# Messages and bytes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_the_user_sees_is_out_and_never_a_hidden_name(tmp_path: Path, number: int) -> None:
    def fail_inside(out: Path) -> None:  # as compress --format onnx nests the two
        with writing(out), unfinished(out) as folder:
            inner = folder / "model-w4"
            with writing(inner), unfinished(inner) as deeper:
                raise OSError(number, os.strerror(number), str(deeper / "model.safetensors"))

    with pytest.raises(swquant.SwquantError) as caught:
        fail_inside(tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: ")
    assert "partial-" not in str(caught.value)


def test_a_long_name_fits(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127, "名" * 85):
        finish(tmp_path / name, "new")
        assert hidden.hidden_name(tmp_path / name).name.isprintable()
    assert len(names(tmp_path)) == 3


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        flushed.append("renamed")
        return rename(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "rename", renamed)
    out = tmp_path / "out"
    finish(out, "new")
    at = flushed.index("renamed")
    assert {"word", "swquant"} < set(flushed[:at])
    assert any(name.startswith(".out.partial-") for name in flushed[:at])
    assert flushed[at + 1 :] == [tmp_path.name]
    del flushed[:]
    write_whole(tmp_path / "table", b"1")
    assert len(flushed) == 2
    assert flushed[1] == tmp_path.name
    assert (tmp_path / "table").read_bytes() == b"1"


# Signals

CHILD = """
import os, signal, sys, time
from pathlib import Path
from swquant.output.destination import unfinished
try:
    with unfinished(Path(sys.argv[1])) as folder:
        (folder / "half").write_text("half")
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))
    print("finished", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def child(out: Path, seconds: float, *, ignore: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignore else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = child(tmp_path / "out", 60)
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert names(tmp_path) == set()


def test_who_is_told_to_ignore_a_closed_terminal_ignores_it(tmp_path: Path) -> None:
    process = child(tmp_path / "out", 1, ignore=True)  # as nohup does
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[0] == "finished\n"


def test_a_killed_run_leaves_what_the_next_one_removes(tmp_path: Path) -> None:
    process = child(tmp_path / "out", 60)
    process.kill()
    process.communicate()
    assert len(names(tmp_path)) == 1
    finish(tmp_path / "other", "new")
    assert names(tmp_path) == {"other"}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_what_is_being_put_in_order_is_put_in_order(number: signal.Signals) -> None:
    done: list[str] = []

    def put_in_order() -> None:
        with sigterm_interrupts(), uninterrupted():
            signal.raise_signal(number)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        put_in_order()
    assert done


def test_the_manifest_of_these_tests_is_canonical(compressed: Path) -> None:
    import json

    assert json_bytes(json.loads((compressed / MANIFEST).read_bytes())) == (compressed / MANIFEST).read_bytes()
