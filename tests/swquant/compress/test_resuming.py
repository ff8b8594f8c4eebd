"""A run that was interrupted is taken up: the bytes are those of a run that was not, whatever happened in between."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT, Planted

import swquant
from exporters.safetensors_file import SafetensorsReader, SafetensorsWriter
from exporters.sidecar import SIDECAR
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline, report, resuming
from swquant.compress.options import CompressOptions
from swquant.compress.plan import TensorPlan
from swquant.compress.prepared import Prepared
from swquant.output import hidden
from swquant.output.destination import unfinished
from swquant.output.journal import read_journal
from swquant.output.resumable import resumable
from swquant.progress import Progress

OPTIONS = CompressOptions(prompt=PROMPT, preset="fast", bits=8, outliers=0.01, shard_size="1MB")


class Notes(Progress):
    """What a person is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, text: str) -> None:
        self.seen.append(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def plain_charts() -> Iterator[None]:
    """Charts take ten times as long as such small weights. `test_failures` and the slow kills draw them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda chart: f"<svg>{chart.name}</svg>")
        yield


@pytest.fixture(scope="module")
def prepared(wide_llama: Planted) -> Iterator[Prepared]:
    with open_checkpoint(wide_llama.folder) as checkpoint:
        yield pipeline.prepare(checkpoint, OPTIONS)


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody interrupts writes: several shards."""
    out = tmp_path_factory.mktemp("whole") / "out"
    pipeline.write(prepared, out)
    assert sum(name.startswith("model-") for name in tree(out)) > 2
    return tree(out)


def writes(tensors: Iterable[TensorPlan]) -> int:
    """How often something is written for tensors: their parts, and rows, columns and values of their patches."""
    return sum(len(tensor.layout) + 3 * len(tensor.patches) for tensor in tensors)


def left(out: Path) -> Path:
    return hidden.left_name(out)


def stopped(prepared: Prepared, out: Path, at: int, *, error: BaseException | None = None) -> None:
    """A run that ends in an error when it writes for the `at`-th time."""
    calls = 0
    write = SafetensorsWriter.write

    def counted(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> str:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error or KeyboardInterrupt
        return write(writer, name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", counted)
        with pytest.raises((KeyboardInterrupt, swquant.SwquantError, MemoryError)):
            pipeline.write(prepared, out)
    assert not out.exists()


def stopped_before(
    act: str, prepared: Prepared, out: Path, error: BaseException | None = None, **how: bool
) -> pytest.ExceptionInfo[BaseException]:
    """A run that wrote all weights and ends in an error at the call of `pipeline.act`."""

    def failing(*_: object) -> None:
        raise error or KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, act, failing)
        with pytest.raises((KeyboardInterrupt, swquant.SwquantError)) as caught:
            pipeline.write(prepared, out, **how)
    return caught


def go_on(prepared: Prepared, out: Path, **how: bool) -> int:
    """Take a run up. Returns how many tensors were there."""
    notes = Notes()
    pipeline.write(prepared, out, progress=notes, **how)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return int(notes.seen[0].split()[2]) if notes.seen else 0


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
    caught = stopped_before("verify", prepared, tmp_path / "out")
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


# Only what verifies is trusted


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/model-*.safetensors"))


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


def size(path: Path) -> int:
    return path.stat().st_size


def exchange_lines(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[-2], lines[-3] = lines[-3], lines[-2]
    journal.write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def half(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was interrupted in the third shard. Do not change it."""
    out = tmp_path_factory.mktemp("half") / "out"
    stopped(prepared, out, sum(map(writes, prepared.plan.shards[:2])) + 8)
    assert len(shards(left(out))) == 3
    return left(out)


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


# Of other work


@pytest.fixture
def again(wide_llama: Planted, half: Path, tmp_path: Path) -> Callable[..., object]:
    """The command again, into an OUT of which `half` is left."""
    shutil.copytree(half, left(tmp_path / "out"))

    def call(**changes: object) -> object:
        return swquant.compress(wide_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"), **changes)  # type: ignore[arg-type]

    return call


def test_the_same_command_goes_on(again: Callable[..., object], whole: dict[str, bytes], tmp_path: Path) -> None:
    notes = Notes()
    again(progress=notes)
    assert notes.seen[0].startswith("Going on: ")
    assert tree(tmp_path / "out") == whole


def refused(again: Callable[..., object], tmp_path: Path, words: str, **changes: object) -> None:
    before = tree(tmp_path)
    with pytest.raises(swquant.SwquantError, match=f"/out: .*{words}.*--fresh starts over, or give another OUT"):
        again(**changes)
    assert tree(tmp_path) == before


def test_other_options_are_named_and_lose_nothing(again: Callable[..., object], tmp_path: Path) -> None:
    words = r"left \d+ of \d+ tensors, with other options \(--bits 8, now 4, --seed 0, now 1\)"
    refused(again, tmp_path, words, bits=4, seed=1)


def test_they_are_found_before_the_prompt_is_run(
    again: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prepare", None)  # would be a TypeError if it came that far
    refused(again, tmp_path, "other options", bits=4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("__version__", "0.0.1", "swquant 0"),
        ("machine", lambda: {"processor": "abacus", "torch": "1", "numba": "1"}, "processor .*, now abacus"),
    ],
)
def test_another_version_or_processor(
    again: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, words: str
) -> None:
    monkeypatch.setattr(resuming, name, value)
    refused(again, tmp_path, words)


def test_another_model_of_the_same_form(half: Path, wide_llama: Planted, tmp_path: Path) -> None:
    """Equal headers, equal names, other weights: what a training run overwrites every hour."""
    model = Path(shutil.copytree(wide_llama.folder, tmp_path / wide_llama.folder.name))
    shutil.copytree(half, left(tmp_path / "out"))
    flip(next(model.glob("*.safetensors")), -1)
    with pytest.raises(swquant.SwquantError, match="a source whose files were changed since; --fresh"):
        swquant.compress(model, tmp_path / "out", replace(OPTIONS, offsets="none"))


def test_another_model(half: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    with pytest.raises(swquant.SwquantError, match=r"another source \(wide\); --fresh"):
        swquant.compress(bf16_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"))
    swquant.compress(bf16_llama.folder, tmp_path / "out", replace(OPTIONS, offsets="none"), fresh=True)
    assert swquant.verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_evidence_makes_another_plan(prepared: Prepared, half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    name = prepared.plan.quantized[0].name
    record = prepared.found.record(name)
    assert record is not None
    energy = record.energy.clone()
    record.energy[0] *= 1.0001
    try:
        with pytest.raises(swquant.SwquantError, match="another plan; --fresh"):
            pipeline.write(prepared, tmp_path / "out")
    finally:
        record.energy.copy_(energy)


# Beside others


def test_a_living_run_is_not_disturbed(again: Callable[..., object], tmp_path: Path) -> None:
    with resumable(tmp_path / "out"):
        for changes in ({}, {"fresh": True}):
            with pytest.raises(swquant.SwquantError, match="/out: another run is writing it; wait for that to end"):
                again(**changes)


def test_runs_for_other_places_let_it_be(again: Callable[..., object], whole: dict[str, bytes], tmp_path: Path) -> None:
    with unfinished(tmp_path / "other"), resumable(tmp_path / "third"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [left(tmp_path / "out").name]
    again()
    assert tree(tmp_path / "out") == whole


def test_without_locks_nothing_stays(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swquant.output.resumable.lock", lambda _: None)
    monkeypatch.setattr("swquant.output.hidden.lock", lambda _: None)
    stopped(prepared, tmp_path / "out", 60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_user_put_into_an_exchanged_checkpoint_is_not_deleted(
    prepared: Prepared, half: Path, damaged: Path, tmp_path: Path
) -> None:
    shutil.copytree(half, left(tmp_path / "out"))
    old = damaged.rename(left(tmp_path / "out") / "old")
    (old / "mine").write_text("precious")
    with pytest.raises(swquant.SwquantError, match="old/mine: swquant did not put old/mine there; move it elsewhere"):
        pipeline.write(prepared, tmp_path / "out")
    assert (old / "mine").read_text() == "precious"


def test_overwriting_goes_on_too(prepared: Prepared, whole: dict[str, bytes], damaged: Path) -> None:
    stopped_before("verify", prepared, damaged, overwrite=True)
    assert swquant.verify(damaged) == []
    assert go_on(prepared, damaged, overwrite=True) == len(prepared.plan.tensors)
    assert tree(damaged) == whole


def test_killed_between_the_exchange_and_the_end(prepared: Prepared, whole: dict[str, bytes], damaged: Path) -> None:
    """The old checkpoint lies where the new one was made, and the journal is of the new one still."""
    stopped_before("verify", prepared, damaged, overwrite=True)
    (made,) = (path for path in left(damaged).iterdir() if path.is_dir())
    aside = made.with_name("aside")
    damaged.rename(aside)
    made.rename(damaged)
    aside.rename(made)
    assert tree(damaged) == whole
    go_on(prepared, damaged, overwrite=True)
    assert tree(damaged) == whole


# Commands


def test_dry_run_says_what_is_there(again: Callable[..., object], wide_llama: Planted, tmp_path: Path) -> None:
    plan = swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS, offsets="none")
    assert plan.left.startswith("an interrupted run left ")
    assert plan.left.endswith("tensors, compress goes on from there")
    plan = swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS, bits=4)
    assert "with other options (--bits 8, now 4" in plan.left
    assert plan.left.endswith("compress will ask for --fresh")
    assert swquant.plan(wide_llama.folder, tmp_path / "new", OPTIONS).left == ""
    with resumable(tmp_path / "out"):
        assert swquant.plan(wide_llama.folder, tmp_path / "out", OPTIONS).left == "another run is writing OUT"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_onnx_folder_goes_on_from_the_checkpoint(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swquant.export.onnx import pipeline as export

    def run(out: Path, **how: object) -> None:
        swquant.compress(bf16_llama.folder, out, prompt=PROMPT, format="onnx", **how)  # type: ignore[arg-type]

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(export, "check_export", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    notes = Notes()
    run(tmp_path / "out", progress=notes)
    assert notes.seen[0] == "Going on: 57 of 57 tensors were there"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_the_journal_is_lines_of_json(half: Path) -> None:
    lines = (half / hidden.JOURNAL).read_text().splitlines()
    head, *steps = [json.loads(line)["entry"] for line in lines]
    assert head["options"]["bits"] == 8
    assert head["tensors"] > len(steps) > 10
    assert set(steps[0]) == {"sha256", "patches", "measured"}
    with closing(SafetensorsReader(shards(half)[0])) as reader:
        assert set(steps[0]["sha256"]) <= set(reader.entries)
