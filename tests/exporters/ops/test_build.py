"""The library is compiled where there is a compiler, and its absence is said where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import PROJECT

from exporters.ops import build
from exporters.ops.build import BuildError, build_library, find_compiler, sources


def test_every_source_is_compiled() -> None:
    assert {path.name for path in sources()} >= {"library.cc", "weights.cc", "portable.cc", "avx2.cc", "avx512.cc"}


def test_the_header_stays_small() -> None:
    """It is written by hand; what grows beyond a page should be looked at again."""
    assert len((build.FOLDER / "ort_api.h").read_text().splitlines()) < 100


def test_only_the_entry_point_is_exported(library: Path) -> None:
    """Anything else could collide with a symbol of another library in the process."""
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    strong = [line.split()[-1] for line in done.stdout.splitlines() if line.split()[-2] not in "VWu"]
    assert [name for name in strong if not name.startswith("_ZSt")] == ["RegisterCustomOps"]


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert find_compiler() is None
    with pytest.raises(BuildError, match="install g\\+\\+ or clang\\+\\+, or name one in CXX"):
        build_library(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "bin" / "broken++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    target = tmp_path / "out" / "library.so"
    target.parent.mkdir()
    with pytest.raises(BuildError, match="ended with 3:\nno such header"):
        build_library(target)
    assert list(target.parent.iterdir()) == []


def test_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "win32")
    with pytest.raises(BuildError, match="not on win32|no C\\+\\+ compiler"):
        build_library(tmp_path / "library.so")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_the_wheel(tmp_path: Path, compiler: bool) -> None:
    """Built by pip as a user would: with the library for this machine, or pure with a clear line."""
    if compiler and find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    environment = {**os.environ, "CXX": os.environ.get("CXX", "") if compiler else "/does/not/exist"}
    if not environment["CXX"]:
        del environment["CXX"]
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", str(tmp_path), str(PROJECT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "exporters/ops/weights.cc" in names
    assert ("exporters/ops/libswquant_ops.so" in names) == compiler
    if compiler:
        assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    else:
        assert wheel.name.endswith("-py3-none-any.whl")
        assert "swquant without its operator library: no C++ compiler found" in done.stdout + done.stderr
