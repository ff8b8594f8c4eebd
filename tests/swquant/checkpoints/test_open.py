"""What is opened for reading has tensors, what is opened to be run may have none; kinds answer what differs in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from support.tiny_models import Planted

from exporters.errors import SwquantError
from exporters.onnx.files import MODEL
from swquant.checkpoints.base import Checkpoint, ModelFolder, Stored
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.gguf import GgufCheckpoint
from swquant.checkpoints.onnx import OnnxFolder
from swquant.checkpoints.open import open_checkpoint, open_model
from swquant.checkpoints.safetensors import SafetensorsCheckpoint


def test_an_onnx_folder_can_be_run_and_has_no_tensors_to_read(onnx: Path) -> None:
    with open_model(onnx) as model:
        assert isinstance(model, OnnxFolder)
        assert model.graph == onnx / MODEL
        assert not hasattr(model, "read")
        assert not hasattr(model, "tensors")
        assert not isinstance(model, Checkpoint)
        assert model.tokenizer() is not None
    with pytest.raises(SwquantError, match="an ONNX graph, which can only be run"):
        open_checkpoint(onnx)


def test_its_companions_can_be_copied_like_those_of_any_model(onnx: Path, tmp_path: Path) -> None:
    with open_model(onnx) as model:
        model.save_companions(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (onnx / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["bf16_llama", "compressed"])
def test_both_ways_in_open_the_same_checkpoint(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    folder = found.folder if isinstance(found, Planted) else found
    with open_model(folder) as run, open_checkpoint(folder) as read:
        assert type(run) is type(read)
        assert run.fingerprint == read.fingerprint
        assert isinstance(run, Checkpoint)


def test_a_graph_beside_a_checkpoint_is_not_run(damaged: Path) -> None:
    (damaged / MODEL).write_bytes(b"")
    with pytest.raises(SwquantError, match=r"model\.onnx does not belong to this folder"):
        open_model(damaged)


def test_an_onnx_folder_without_its_graph_is_no_checkpoint(onnx: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx, tmp_path / "onnx"))
    (folder / MODEL).unlink()
    for way_in in (open_model, open_checkpoint):
        with pytest.raises(SwquantError, match="that of an ONNX folder, but the graph is missing"):
            way_in(folder)


def test_a_name_too_long_for_any_disk_is_one_message() -> None:
    with pytest.raises(SwquantError, match="no such folder or file"):
        open_model("x" * 5000)


def test_each_kind_answers_what_differs_in_it() -> None:
    kinds: dict[type[Checkpoint], tuple[str, bool, bool, bool, bool]] = {
        SafetensorsCheckpoint: ("safetensors", False, True, True, True),
        GgufCheckpoint: ("gguf", False, False, False, False),
        CompressedCheckpoint: ("swquant", True, True, False, True),
    }
    stored = Stored(torch.float32, (1,))
    for kind, expected in kinds.items():
        one = kind.__new__(kind)
        assert (one.kind, one.is_compressed, one.stores_floats, one.can_stay_on_disk, one.fills_folder) == expected
        assert one.dense_dtype(stored) is (torch.float32 if one.stores_floats else torch.bfloat16)
    assert issubclass(OnnxFolder, ModelFolder)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_from_the_hub_for_who_trusts_it_and_pickles_for_nobody(
    monkeypatch: pytest.MonkeyPatch, bf16_llama: Planted, trusted: bool
) -> None:
    wanted: dict[str, list[str]] = {}

    def fetch(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], **__: object) -> str:
        wanted.update(allow=allow_patterns, ignore=ignore_patterns)
        return str(bf16_llama.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with open_checkpoint("owner/name", trust_remote_code=trusted) as checkpoint:
        assert checkpoint.name == "name"
    files = [
        "model.safetensors",
        "config.json",
        "tekken.json",
        "modeling_own.py",
        "tokenizer_own.py",
        "vocab.pkl",
        "x.bin",
    ]
    fetched = list(filter_repo_objects(files, allow_patterns=wanted["allow"], ignore_patterns=wanted["ignore"]))
    assert fetched == (files[:5] if trusted else files[:3])
