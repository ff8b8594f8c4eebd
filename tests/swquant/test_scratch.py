"""Temporary folders: gone with the block, and those of killed runs gone with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from swquant import scratch

HOLDS = "from swquant.scratch import temporary_folder\nwith temporary_folder('offload'):\n print('in', flush=True)\n input()"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch._remove_dead.cache_clear()


def holding(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_there_in_the_block_and_gone_behind_it(tmp_path: Path) -> None:
    with scratch.temporary_folder("gguf") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith("swquant-gguf-")
        (folder / "x").write_text("x")
    assert names(tmp_path) == []


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    alive, killed = holding(tmp_path), holding(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    others = ["swquant-offload-12345678x", "swquant-study-abcdefgh", "other"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "swquant-offload-abcdefgh").write_text("a file")
    (tmp_path / "swquant-gguf-abcdefgh").symlink_to(tmp_path / "other")
    (tmp_path / "swquant-gguf-12345678").mkdir()
    assert len(names(tmp_path)) == 8
    with scratch.temporary_folder("rehearsal"):
        pass
    (left,) = set(names(tmp_path)) - {*others, "swquant-offload-abcdefgh", "swquant-gguf-abcdefgh"}
    assert left.startswith("swquant-offload-")
    alive.communicate("\n")
    assert left not in names(tmp_path)
