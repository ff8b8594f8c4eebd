"""What runs that died left beside OUT, and what only looks like it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from support.written import TEXT, finish, make, names

import swquant
from swquant.output import hidden
from swquant.output.destination import unfinished


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
