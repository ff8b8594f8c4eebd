"""What is refused before the work."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline
from swquant.output.destination import check_destination


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
