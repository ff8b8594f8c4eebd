"""OUT appears whole or not at all: whatever happens before the last rename leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import PROMPT, Planted, save_model, tiny_model

import swquant
from exporters.safetensors_file import SafetensorsWriter
from exporters.sidecar import SidecarWriter
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.safetensors import SafetensorsCheckpoint
from swquant.compress import pipeline, writing
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import compress_checkpoint
from swquant.output import exchange, verification
from swquant.output.hidden import left_name
from swquant.progress import Progress

MAIN = [sys.executable, "-c", "from swquant.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}


def raise_at_call(n: int, original: Callable, error: BaseException) -> Callable:
    """`original`, whose n-th call raises instead."""
    calls = 0

    def replacement(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == n:
            raise error
        return original(*args, **kwargs)

    return replacement


# Where a run can be stopped: (object, attribute, call). 55 tensors make 139 parts and three more of the sidecar.
MOMENTS = [
    (SafetensorsWriter, "__init__", 1),
    (SafetensorsWriter, "write", 1),
    (SafetensorsWriter, "write", 2),
    (SafetensorsWriter, "write", 50),
    (SafetensorsWriter, "write", 139),
    (SafetensorsWriter, "finish", 1),
    (SidecarWriter, "write", 1),
    (SidecarWriter, "finish", 1),
    (SafetensorsCheckpoint, "save_companions", 1),
    (writing, "write_json", 1),
    (writing, "write_json", 2),
    (writing, "write_manifest", 1),
    (verification, "verify", 1),
    (pipeline, "replace", 1),
]
BEFORE = MOMENTS[:2]  # the first tensor


def named(moment: tuple) -> str:
    return f"{moment[0].__name__.rpartition('.')[2]}.{moment[1]} {moment[2]}"


@pytest.mark.parametrize("moment", MOMENTS, ids=named)
def test_an_interruption_leaves_nothing_but_what_can_be_taken_up(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple
) -> None:
    owner, name, n = moment
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raise_at_call(n, getattr(owner, name), KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == ([] if moment in BEFORE else [left_name(tmp_path / "out")])


def test_the_same_command_then_gives_the_bytes_of_a_run_that_was_not_interrupted(
    bf16_llama: Planted, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", raise_at_call(70, SafetensorsWriter.write, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt) as caught:
            swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, outliers=0.01)
    assert re.fullmatch(r"\d+ of 57 tensors are kept: the same command goes on, .*", caught.value.__notes__[0])
    swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, outliers=0.01)
    for path in (path for path in compressed.rglob("*") if path.is_file()):
        assert (tmp_path / "out" / path.relative_to(compressed)).read_bytes() == path.read_bytes()
    assert swquant.verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", MOMENTS[:-2], ids=named)
def test_a_full_disk_is_one_message_about_space_and_keeps_what_is_written(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple
) -> None:
    owner, name, n = moment
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(owner, name, raise_at_call(n, getattr(owner, name), full))
    remedy = "choose another OUT" if moment in BEFORE else "make room"
    with pytest.raises(swquant.SwquantError, match=f"/out: no space left; .* GB are needed, .* {remedy}"):
        swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT)
    assert list(tmp_path.iterdir()) == ([] if moment in BEFORE else [left_name(tmp_path / "out")])


def test_too_little_space_is_known_before_the_first_byte(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(SafetensorsWriter, "__init__", None)  # would be a TypeError if it came that far
    with pytest.raises(swquant.SwquantError, match="no space left"):
        swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT)


def test_an_existing_folder_is_refused_and_left_alone(bf16_llama: Planted, compressed: Path, damaged: Path) -> None:
    (damaged / "mine.txt").write_text("precious")
    with pytest.raises(swquant.SwquantError, match="exists already; .*--overwrite"):
        swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT)
    assert (damaged / "mine.txt").read_text() == "precious"


def test_overwrite_replaces_a_checkpoint(bf16_llama: Planted, damaged: Path) -> None:
    (damaged / "tokenizer.json").write_text("{}")  # what is listed is ours, whatever became of it
    swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT, bits=8, overwrite=True)
    assert swquant.verify(damaged) == []
    assert swquant.inspect(damaged)["options"]["bits"] == 8
    assert [path.name for path in damaged.parent.iterdir()] == [damaged.name]


def test_overwrite_replaces_an_empty_folder_but_no_other_folder_and_no_file(
    bf16_llama: Planted, tmp_path: Path
) -> None:
    empty, other, file = tmp_path / "empty", tmp_path / "photos", tmp_path / "file"
    empty.mkdir()
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    file.write_text("text")
    for refused in (other, file):
        with pytest.raises(
            swquant.SwquantError, match="was not made by swquant; --overwrite replaces only what it made"
        ):
            swquant.compress(bf16_llama.folder, refused, prompt=PROMPT, overwrite=True)
    swquant.compress(bf16_llama.folder, empty, prompt=PROMPT, overwrite=True)
    assert swquant.verify(empty) == []
    assert (other / "cat.jpg").read_bytes() == b"cat"
    assert file.read_text() == "text"


@pytest.mark.parametrize("moment", [MOMENTS[1], MOMENTS[-3], MOMENTS[-2]], ids=named)
def test_the_old_checkpoint_survives_a_failed_overwrite(
    bf16_llama: Planted, damaged: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple
) -> None:
    owner, name, n = moment
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raise_at_call(n, getattr(owner, name), KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT, bits=8, overwrite=True)
    assert swquant.verify(damaged) == []
    assert {path.name for path in damaged.parent.iterdir()} - {left_name(damaged).name} == {damaged.name}


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
def test_the_old_checkpoint_survives_a_failure_between_the_two_renames(
    bf16_llama: Planted, damaged: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "exchange", lambda *_: False)  # as where the system has none
        patch.setattr(Path, "rename", raise_at_call(2, Path.rename, error))
        with pytest.raises((swquant.SwquantError, KeyboardInterrupt)):
            swquant.compress(bf16_llama.folder, damaged, prompt=PROMPT, bits=8, overwrite=True)
    assert swquant.verify(damaged) == []
    assert {path.name for path in damaged.parent.iterdir()} == {damaged.name, left_name(damaged).name}


def test_overwrite_never_replaces_the_source(source: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="source"):
        swquant.compress(source, source, prompt=PROMPT, overwrite=True)
    assert not (source / "swquant").exists()


class Intruder(Progress):
    """Creates a folder while the result is being verified, as a second run with the same OUT would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        if text.startswith("Verifying"):
            self.folder.mkdir()
            (self.folder / "theirs.txt").write_text("precious")
        yield


def test_a_folder_that_appears_meanwhile_is_not_replaced(bf16_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_checkpoint(bf16_llama.folder) as checkpoint, pytest.raises(swquant.SwquantError, match="exists"):
        compress_checkpoint(checkpoint, out, CompressOptions(prompt=PROMPT), progress=Intruder(out))
    assert [path.name for path in out.iterdir()] == ["theirs.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", left_name(out).name}
    out.rename(tmp_path / "theirs")
    swquant.compress(bf16_llama.folder, out, prompt=PROMPT)  # which has nothing to round any more
    assert swquant.verify(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", "theirs"}


@pytest.mark.parametrize("name", ["no/such/folder/out", "x" * 240, "x" * 300], ids=["no parent", "long", "too long"])
def test_a_name_that_cannot_be_created_is_one_message(bf16_llama: Planted, tmp_path: Path, name: str) -> None:
    try:
        out = swquant.compress(bf16_llama.folder, tmp_path / name, prompt=PROMPT).path
    except swquant.SwquantError as error:
        assert name[:100] in str(error)
        assert list(tmp_path.iterdir()) == []
    else:
        assert swquant.verify(out) == []


def test_a_compressed_model_is_no_source(compressed: Path, tmp_path: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="already compressed; start from the original"):
        swquant.compress(compressed, tmp_path / "again", prompt=PROMPT)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose compression takes a second or more: 25 million weights."""
    model = tiny_model("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    return save_model(model, tmp_path_factory.mktemp("slow") / "slow", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("written", [0, 5_000_000], ids=["at once", "midway"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_exits_with_130_and_the_same_command_goes_on(
    slow_source: Path, tmp_path: Path, sent: signal.Signals, written: int
) -> None:
    command = [*MAIN, "compress", str(slow_source), str(tmp_path / "out"), "--prompt", PROMPT, "--outliers", "0.05"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    files = ".out.unfinished-*/*/model-*"
    while process.poll() is None and sum(path.stat().st_size for path in tmp_path.glob(files)) <= written:
        time.sleep(0.001)
    assert process.poll() is None, "finished before it could be interrupted"
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    if not written and not list(tmp_path.iterdir()):
        assert errors.endswith("interrupted; nothing half-written was left behind\n")
        return
    kept = re.search(r"interrupted; (\d+ of \d+ tensors) are kept: the same command goes on", errors)
    assert kept, errors
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert f"Going on: {kept[1]} were there" in again.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert swquant.verify(tmp_path / "out") == []


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_is_one_message(bf16_llama: Planted, tmp_path: Path) -> None:
    import resource

    result = subprocess.run(
        [*MAIN, "compress", str(bf16_llama.folder), str(tmp_path / "out"), "--prompt", PROMPT],
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "cannot be written (File too large)" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
