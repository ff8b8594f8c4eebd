"""What is said of a failure, names that fit, and bytes that are on the disk before they get their name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.written import finish, names

import swquant
from swquant.output import hidden
from swquant.output.destination import unfinished, write_whole, writing


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
