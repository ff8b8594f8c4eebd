"""A run, what it writes when nobody interrupts it, and what it leaves when somebody does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.interrupted import OPTIONS, left, shards, stopped, tree, writes
from support.tiny_models import Planted

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline, report
from swquant.compress.prepared import Prepared


@contextmanager
def _plain() -> Iterator[None]:
    """Charts take ten times as long as such small weights. `test_failures` and the slow kills draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda chart: f"<svg>{chart.name}</svg>")
        yield


@pytest.fixture(autouse=True)
def plain_charts() -> Iterator[None]:
    """For a test at a time: what holds longer would be met by tests of other folders."""
    with _plain():
        yield


@pytest.fixture(scope="package")
def prepared(wide_llama: Planted) -> Iterator[Prepared]:
    with open_checkpoint(wide_llama.folder) as checkpoint:
        yield pipeline.prepare(checkpoint, OPTIONS)


@pytest.fixture(scope="package")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody interrupts writes: several shards."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with _plain():
        pipeline.write(prepared, out)
    assert sum(name.startswith("model-") for name in tree(out)) > 2
    return tree(out)


@pytest.fixture(scope="package")
def half(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was interrupted in the third shard. Do not change it."""
    out = tmp_path_factory.mktemp("half") / "out"
    with _plain():
        stopped(prepared, out, sum(map(writes, prepared.plan.shards[:2])) + 8)
    assert len(shards(left(out))) == 3
    return left(out)


@pytest.fixture
def again(wide_llama: Planted, half: Path, tmp_path: Path) -> Callable[..., object]:
    """The command again, into an OUT of which `half` is left."""
    shutil.copytree(half, left(tmp_path / "out"))

    def call(**changes: object) -> object:
        return swquant.compress(wide_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"), **changes)  # type: ignore[arg-type]

    return call
