"""Runs of `compress` that are stopped, taken up and damaged between the two: for the tests of resuming."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT

import swquant
from exporters.safetensors_file import SafetensorsWriter
from swquant.compress import pipeline
from swquant.compress.options import CompressOptions
from swquant.compress.plan import TensorPlan
from swquant.compress.prepared import Prepared
from swquant.output import hidden
from swquant.progress import Progress

__all__ = ["OPTIONS", "Notes", "flip", "go_on", "left", "shards", "size", "stopped", "stopped_before", "tree", "writes"]

OPTIONS = CompressOptions(prompt=PROMPT, preset="fast", bits=8, outliers=0.01, shard_size="1MB")


class Notes(Progress):
    """What a person is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, text: str) -> None:
        self.seen.append(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def size(path: Path) -> int:
    return path.stat().st_size


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/model-*.safetensors"))
