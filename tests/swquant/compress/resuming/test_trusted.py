"""Only what verifies is trusted of what an interrupted run left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.interrupted import flip, go_on, left, shards, size, stopped, tree

from exporters.safetensors_file import SafetensorsReader
from exporters.sidecar import SIDECAR
from swquant.compress.prepared import Prepared
from swquant.output import hidden


def damage_first_tensor(folder: Path) -> None:
    with SafetensorsReader(shards(folder)[0]) as reader:
        start = next(iter(reader.entries.values())).start
    flip(shards(folder)[0], start)


DAMAGE: dict[str, tuple[Callable[[Path], object], bool]] = {  # what happens to it, and whether anything is left
    "the last line of the journal is cut": (lambda at: os.truncate(at / hidden.JOURNAL, size(at / hidden.JOURNAL) - 9), True),
    "a byte of the last line": (lambda at: flip(at / hidden.JOURNAL, size(at / hidden.JOURNAL) - 60), True),
    "two lines change places": (lambda at: exchange_lines(at / hidden.JOURNAL), True),
    "a shard is cut": (lambda at: os.truncate(shards(at)[-1], size(shards(at)[-1]) // 2), True),
    "a byte of the last shard": (lambda at: flip(shards(at)[-1], size(shards(at)[-1]) // 2), True),
    "a byte of the first tensor": (damage_first_tensor, False),
    "a byte of the first shard's header": (lambda at: flip(shards(at)[0], 20), False),
    "the first shard is gone": (lambda at: shards(at)[0].unlink(), False),
    "a shard is a text": (lambda at: shards(at)[1].write_text("text"), True),
    "the sidecar is gone": (lambda at: next(at.glob(f"*/{SIDECAR}")).unlink(), True),
    "a byte of the sidecar": (lambda at: flip(next(at.glob(f"*/{SIDECAR}")), -1), True),
    "something else lies there": (lambda at: (shards(at)[0].parent / "old.json").write_text("{}"), True),
    "more follows": (lambda at: shards(at)[-1].write_bytes(shards(at)[-1].read_bytes() + b"more"), True),
    "the journal is empty": (lambda at: (at / hidden.JOURNAL).write_bytes(b""), False),
    "the journal is no journal": (lambda at: (at / hidden.JOURNAL).write_bytes(b"\xff[[[[\n" * 10), False),
    "the journal is nested": (lambda at: (at / hidden.JOURNAL).write_bytes(b"[" * 100_000), False),
}  # fmt: skip


def exchange_lines(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[-2], lines[-3] = lines[-3], lines[-2]
    journal.write_bytes(b"".join(lines))


@pytest.mark.parametrize("what", DAMAGE)
def test_only_what_verifies_is_trusted(
    prepared: Prepared, whole: dict[str, bytes], half: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(half, left(out))
    damage, something = DAMAGE[what]
    damage(left(out))
    assert (go_on(prepared, out) > 0) is something
    assert tree(out) == whole


def test_interrupted_after_damage_no_later_line_is_believed(
    prepared: Prepared, whole: dict[str, bytes], half: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(half, left(out))
    damage_first_tensor(left(out))
    stopped(prepared, out, 12)
    assert 0 < go_on(prepared, out) < 12
    assert tree(out) == whole
