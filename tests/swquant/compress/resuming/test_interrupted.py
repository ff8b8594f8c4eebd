"""A run that was interrupted is taken up: the bytes are those of a run that nobody interrupted."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.interrupted import OPTIONS, go_on, left, stopped, stopped_before, tree, writes
from support.tiny_models import Planted

import swquant
from exporters.safetensors_file import SafetensorsWriter
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline, resuming
from swquant.compress.prepared import Prepared
from swquant.output import hidden
from swquant.output.journal import read_journal


def snapshots(prepared: Prepared, folder: Path, moments: int) -> list[Path]:
    """What SIGKILL would leave at many moments of one run: Python's buffers are lost, all else is there."""
    out, kept, calls = folder / "run" / "out", [], 0
    out.parent.mkdir()
    parts = writes(prepared.plan.tensors)
    write = SafetensorsWriter.write

    def watched(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> str:
        nonlocal calls
        calls += 1
        if len(kept) < moments and calls >= (len(kept) + 0.5) * parts / moments:
            kept.append(Path(shutil.copytree(left(out), folder / f"killed-{len(kept)}")))
        return write(writer, name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", watched)
        pipeline.write(prepared, out)
    return kept


@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["every tensor", "in batches"])
def test_killed_at_any_moment_it_gives_the_same_bytes(
    prepared: Prepared, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(resuming, "_SECONDS", seconds)
    monkeypatch.setattr(resuming, "_BYTES", 300_000)
    reached = []
    for index, killed in enumerate(snapshots(prepared, tmp_path, 6)):
        out = tmp_path / f"again-{index}" / "out"
        out.parent.mkdir()
        killed.rename(left(out))
        reached.append(go_on(prepared, out))
        assert tree(out) == whole
    assert reached == sorted(reached)
    assert reached[-1] > len(prepared.plan.tensors) / 2
    if not seconds:  # nothing but what was being written is lost
        assert reached[0] > 0


def test_interrupted_again_and_again_it_gets_there(prepared: Prepared, whole: dict[str, bytes], tmp_path: Path) -> None:
    out, reached = tmp_path / "out", []
    for _ in range(5):
        stopped(prepared, out, 30)
        reached.append(len(read_journal(left(out) / hidden.JOURNAL)) - 1)
    assert reached == sorted(set(reached))
    assert go_on(prepared, out) == reached[-1]
    assert tree(out) == whole


def test_what_the_user_is_told(prepared: Prepared, tmp_path: Path) -> None:
    total = len(prepared.plan.tensors)
    caught = stopped_before("check_result", prepared, tmp_path / "out")
    assert caught.value.__notes__ == [
        f"{total} of {total} tensors are kept: the same command goes on, with --fresh it starts over"
    ]
    assert go_on(prepared, tmp_path / "out") == total


def test_before_the_first_tensor_nothing_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    stopped(prepared, tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == []


def test_fresh_starts_over(prepared: Prepared, whole: dict[str, bytes], tmp_path: Path) -> None:
    stopped(prepared, tmp_path / "out", 60)
    assert go_on(prepared, tmp_path / "out", fresh=True) == 0
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError()], ids=["full disk", "no memory"]
)
def test_after_another_failure_it_goes_on_too(
    prepared: Prepared, whole: dict[str, bytes], tmp_path: Path, error: BaseException
) -> None:
    stopped(prepared, tmp_path / "out", 60, error=error)
    assert go_on(prepared, tmp_path / "out") > 10
    assert tree(tmp_path / "out") == whole


def test_a_full_disk_is_one_line_that_says_what_is_kept(prepared: Prepared, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    caught = stopped_before("replace", prepared, tmp_path / "out", full)
    assert re.fullmatch(r".*/out: no space left; .* are free; make room", str(caught.value))
    assert "tensors are kept" in caught.value.__notes__[0]


def test_space_is_asked_for_what_is_missing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(prepared, tmp_path / "out", 60)
    free = prepared.plan.nbytes - 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    assert go_on(prepared, tmp_path / "out") > 10


def test_work_that_cannot_be_carried_out_leaves_nothing(
    wide_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(wide_llama.folder) as checkpoint:
        made = pipeline.prepare(checkpoint, OPTIONS)
        read, last = checkpoint.read, list(checkpoint.tensors)[-1]
        monkeypatch.setattr(checkpoint, "read", lambda name: read(name) * (float("nan") if name == last else 1))
        with pytest.raises(swquant.SwquantError, match="NaN"):
            pipeline.write(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
