"""Ordinary model folders: `--overwrite` replaces them as long as every file is as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import Cli, one_line
from support.tiny_models import save_model, tiny_model

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.origin import CARD
from swquant.output.contents import FILES, sha256_of_file, why_not_ours
from swquant.output.dense import Written, dense_folder, stored_form


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama", num_hidden_layers=2), tmp_path / "source", torch.bfloat16)


@pytest.fixture
def ordinary(source: Path, tmp_path: Path) -> Path:
    """A copy of it as `dense_folder` writes one."""
    write(source, tmp_path / "out")
    return tmp_path / "out"


def write(source: Path, out: Path, times: float = 1, *, overwrite: bool = False) -> None:
    with open_checkpoint(source) as checkpoint:
        tensors = {
            name: Written(stored_form(checkpoint, name), lambda name=name: times * checkpoint.read(name))
            for name in checkpoint.tensors
        }
        with dense_folder(checkpoint, out, tensors, checkpoint.raw_config, ("made.json", {}), overwrite=overwrite):
            pass


def test_every_file_is_listed_with_its_hash(ordinary: Path) -> None:
    listed = json.loads((ordinary / FILES).read_text())["files"]
    there = {path.relative_to(ordinary).as_posix() for path in ordinary.rglob("*") if path.is_file()}
    assert set(listed) == there - {FILES}
    assert "model.safetensors" in listed
    assert all(sha256_of_file(ordinary / name) == digest for name, digest in listed.items())
    assert why_not_ours(ordinary) is None


def test_verify_says_what_was_changed(cli: Cli, ordinary: Path) -> None:
    ran = cli("verify", ordinary)
    assert (ran.code, ran.err) == (0, "")
    assert "every byte as written" in ran.out
    config = ordinary / "config.json"
    config.write_text(config.read_text() + " ")
    (ordinary / "tokenizer.json").unlink()
    (ordinary / "notes.txt").write_text("mine")
    assert swquant.verify(ordinary) == [
        f"tokenizer.json: listed in {FILES}, but not there",
        "config.json: not as it was written",
        "notes.txt: not as it was written",
    ]
    assert cli("verify", ordinary).code == 1


def test_what_is_as_it_was_is_replaced(source: Path, ordinary: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="exists already; give another OUT, or --overwrite to replace it$"):
        write(source, ordinary, 2)
    before = load_file(ordinary / "model.safetensors")
    write(source, ordinary, 2, overwrite=True)
    after = load_file(ordinary / "model.safetensors")
    assert all(torch.equal(after[name], 2 * before[name]) for name in before)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", CARD, "optimizer.pt"])
def test_what_was_trained_further_is_not(source: Path, ordinary: Path, name: str) -> None:
    path = ordinary / name
    if name == "model.safetensors":  # as another trainer saves it: the same name and size
        weights = load_file(path)
        weights["model.norm.weight"] += 1
        save_file(weights, path, {"format": "pt"})
    else:
        path.write_text((path.read_text() if path.exists() else "") + " ")
    kept = path.read_bytes()
    with pytest.raises(
        swquant.SwquantError, match=f"holds {name}, which swquant did not put there as it is; move that"
    ):
        write(source, ordinary, overwrite=True)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "swquant-files-1", "files": []}'])
def test_a_list_that_cannot_be_relied_on_is_none(source: Path, ordinary: Path, content: str) -> None:
    (ordinary / FILES).write_text(content)
    with pytest.raises(swquant.SwquantError, match=f"its {FILES} cannot be relied on; move it away"):
        write(source, ordinary, overwrite=True)


def test_commands_replace_their_own_results(cli: Cli, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    students = ("distill", source, out, "--layers", "0")
    mixtures = ("moe", source, out, "--experts", "1x2")
    assert cli(*students).code == 0
    assert "or --overwrite to replace it" in one_line(cli(*mixtures))
    for typed, record in ((mixtures, "moe.json"), (students, "distill.json")):
        ran = cli(*typed, "--overwrite")
        assert ran.code == 0, ran.err
        assert {path.name for path in (out / "swquant").iterdir()} == {record, "files.json"}
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt" in one_line(cli(*mixtures, "--overwrite"))
    assert (
        one_line(cli("moe", source, out / "notes.txt")).partition(": ")[2][-32:] == "exists already; give another OUT"
    )
