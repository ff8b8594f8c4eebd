"""`doctor` must work where something is missing: that is what it is for."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
from support.command_line import Cli
from support.paths import PROJECT

from swquant import doctor


@pytest.mark.parametrize("package", sorted(doctor._NEEDED))
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    version, load = importlib.metadata.version, importlib.import_module

    def no_version(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def no_module(name: str, *more: object, **options: object) -> object:
        if name == package.replace("-", "_"):
            raise ImportError(name)
        return load(name, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(doctor.importlib.metadata, "version", no_version)
    monkeypatch.setattr(doctor.importlib, "import_module", no_module)
    ran = cli("doctor")
    assert ran.code == 1
    assert re.search(
        rf"missing {package} \(not installed\), needed for .*: pip install {package}$", ran.out, re.MULTILINE
    )
    report = cli("doctor", "--json")
    assert report.code == 1
    assert [item["package"] for item in json.loads(report.out)["missing"]] == [package]


def test_a_broken_package_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def broken(name: str, *more: object, **options: object) -> object:
        if name == "gguf":
            raise OSError("libfoo.so: cannot open\nsecond line")
        return load(name, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    (item,) = doctor.examine()["missing"]
    assert item == {"package": "gguf", "for": "GGUF files", "problem": "OSError: libfoo.so: cannot open"}


def test_every_dependency_is_examined() -> None:
    """Those without which the command line does not even start need no examination."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    assert names - {"rich", "typer"} == set(doctor._NEEDED)


def test_a_library_that_was_not_compiled_comes_with_the_command(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("exporters.ops.library_path", lambda: None)
    monkeypatch.setattr("exporters.ops.build.find_compiler", lambda: "/usr/bin/c++")
    assert doctor.examine()["operators"]["remedy"] == "python -m exporters.ops.build"
    assert "run through the function they carry: python -m exporters.ops.build" in cli("doctor").out
    monkeypatch.setattr("exporters.ops.build.find_compiler", lambda: None)
    assert "install a C++ compiler" in doctor.examine()["operators"]["remedy"]


def test_a_library_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libswquant_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr("exporters.ops.library_path", lambda: broken)
    operators = doctor.examine()["operators"]
    assert operators["library"] == str(broken)
    assert "libswquant_ops.so" in operators["problem"]
    assert operators["remedy"] == "python -m exporters.ops.build"
