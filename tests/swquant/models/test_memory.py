"""How much memory there is: a container's limit counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from swquant.models import memory


def group(folder: Path, limit: str, held: int = 700, files: int = 100) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{held}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 3\n")


@pytest.mark.parametrize(("limit", "left"), [("1000", 400), ("600", 0), ("100", 0)])
def test_the_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, left: int
) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    group(tmp_path, limit)
    assert memory.available_memory() == left


def test_without_one_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.available_memory() > 1_000_000
    group(tmp_path, "max")
    assert memory.available_memory() > 1_000_000
    (tmp_path / "memory.max").write_text("what?")
    assert memory.available_memory() > 1_000_000
