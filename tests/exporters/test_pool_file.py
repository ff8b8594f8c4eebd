"""Sets of a pool as files: what was written is read, part by part or whole, and what is none is refused."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from calibrationless import Blocks
from exporters.errors import CheckpointError
from exporters.pool_file import PoolFile, StoredSet, pool_path, write_pool_file


def blocks(count: int = 2) -> Blocks:
    rows = torch.arange(count, dtype=torch.int32)
    return Blocks(rows, rows.flip(0), torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16())


CONTENT = StoredSet(
    "law",
    "f00d",
    {"tasks": {"law": {"limit": 1.5}}},
    {"a.weight": blocks(), "b.c.weight": blocks(1)},
    {"a.weight": torch.eye(4).expand(2, 4, 4).contiguous(), "b.c.weight": torch.zeros(1, 4, 0)},
    {"a.weight": torch.zeros(2, 4, 1), "b.c.weight": torch.ones(1, 4, 1)},
    {"law": torch.ones(2, 6)},
)


def same(one: StoredSet, other: StoredSet) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    named = (one.name, one.base, one.record, list(ours)) == (other.name, other.base, other.record, list(theirs))
    return named and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    record = write_pool_file(tmp_path / "law.safetensors", CONTENT)
    assert record.nbytes == (tmp_path / "law.safetensors").stat().st_size
    with PoolFile(tmp_path / "law.safetensors") as file:
        assert same(file.whole(), CONTENT)
        assert file.weights == ("a.weight", "b.c.weight")
        assert torch.equal(file.blocks("a.weight", (8, 8)).values, CONTENT.blocks["a.weight"].values)
        assert list(file.keys()) == ["law"]
        assert file.sha256() == record.sha256
        with pytest.raises(CheckpointError, match="outside its shape"):
            file.blocks("a.weight", (4, 4))


def test_a_state_gives_it_back() -> None:
    assert same(StoredSet.of("law", "f00d", CONTENT.record, CONTENT.tensors()), CONTENT)


def test_the_base_has_text_and_no_blocks(tmp_path: Path) -> None:
    content = StoredSet("base", "f00d", keys={"base": torch.ones(2, 3)}, text=torch.ones(2, 5, dtype=torch.int32))
    write_pool_file(tmp_path / "base.safetensors", content)
    with PoolFile(tmp_path / "base.safetensors") as file:
        assert same(file.whole(), content)
        assert file.weights == ()
    assert pool_path("base") == "swquant/pool/base.safetensors"


GOOD = {"format": "swquant-set", "version": "1", "name": "law", "base": "f00d", "record": "{}"}


@pytest.mark.parametrize(
    ("metadata", "changes", "problem"),
    [
        ({"format": "swquant-patches"}, {}, "format swquant-patches 1 is not swquant-set 1"),
        ({"version": "2"}, {}, "is not swquant-set 1"),
        ({"record": "{"}, {}, "does not say what it holds"),
        ({"record": "[" * 100_000}, {}, "does not say what it holds"),
        ({"base": None}, {}, "does not say what it holds"),
        ({}, {"odd": torch.ones(1)}, "holds 'odd', which no set has"),
        ({}, {"blocks/a.weight.cols": None}, "lacks blocks/a.weight.cols"),
    ],
    ids=str,
)
def test_what_is_no_set_is_refused(tmp_path: Path, metadata: dict, changes: dict, problem: str) -> None:
    tensors: dict[str, Any] = {**CONTENT.tensors(), **changes}
    said = {key: value for key, value in {**GOOD, **metadata}.items() if value is not None}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({key: value for key, value in tensors.items() if value is not None}, path, said)
    with pytest.raises(CheckpointError, match=problem):
        PoolFile(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"seen/a.weight": torch.full((2, 4, 1), torch.nan)},
        {"seen/a.weight": torch.ones(2, 4)},
        {"key/law": torch.ones(2, 6, dtype=torch.float64)},
    ],
    ids=lambda item: next(iter(item)),
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, changes: dict) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**CONTENT.tensors(), **changes}, path, GOOD)
    with PoolFile(path) as file, pytest.raises(CheckpointError, match="is not a finite float32 tensor"):
        file.whole()
