"""One tensor's result is a value: made in other processes, it gives the same checkpoint byte for byte."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import PROMPT, Planted, planted_model

import swquant
from calibrationless import Columns
from exporters.sidecar import COLUMNS, SIDECAR, SidecarReader
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import writing
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import compress_checkpoint
from swquant.compress.plan import TensorPlan
from swquant.compress.tensor import RoundedTensor, round_tensor

PRESETS: list[dict[str, Any]] = [
    {"preset": "fast"},
    {},
    {"preset": "best", "texts": 2},
    {"symmetric": False, "keep_columns": 3},
    {"bits": 8, "activations": "int8"},
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", PRESETS, ids=str)
def test_other_processes_give_the_same_bytes(
    options: dict[str, Any], bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = CompressOptions(block="32", prompt=PROMPT, **options)
    here, there = tmp_path / "here", tmp_path / "there"
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        compress_checkpoint(checkpoint, here, chosen)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            monkeypatch.setattr(
                writing, "round_tensor", lambda *arguments: pool.submit(round_tensor, *arguments).result()
            )
            compress_checkpoint(checkpoint, there, chosen)
    assert contents(here) == contents(there)


def test_the_result_has_the_parts_that_the_plan_announced(
    bf16_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[TensorPlan, RoundedTensor]] = []

    def keep(plan: TensorPlan, *rest: Any) -> RoundedTensor:
        made.append((plan, round_tensor(plan, *rest)))
        return made[-1][1]

    monkeypatch.setattr(writing, "round_tensor", keep)
    swquant.compress(bf16_llama.folder, tmp_path / "out", block="32", prompt=PROMPT, outliers=0.01, keep_columns=2)
    assert {plan.name for plan, _ in made} == set(swquant.inspect(tmp_path / "out")["tensors"])
    for plan, rounded in made:
        assert rounded.name == plan.name
        assert {name: (part.dtype, tuple(part.shape)) for name, part in rounded.parts.items()} == dict(plan.layout)
        assert {name: len(patch) for name, patch in rounded.patches.items()} == {
            patch.set: patch.count for patch in plan.patches
        }
        assert (rounded.error is None) == (plan.recipe is None)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral", "gpt_neox"])
def test_columns_are_written_verified_and_restored(architecture: str, tmp_path: Path) -> None:
    """A second kind of patch, off by default, from the command's option to the loaded model."""
    model = planted_model(architecture, tmp_path / "model", torch.bfloat16).folder
    out, plain = tmp_path / "out", tmp_path / "plain"
    swquant.compress(model, plain, block="32", prompt=PROMPT)
    manifest = swquant.compress(model, out, block="32", prompt=PROMPT, keep_columns=3).manifest
    assert swquant.verify(out) == []
    kept = {name: record["columns"] for name, record in manifest["tensors"].items() if "columns" in record}
    linear = [name for name, record in manifest["tensors"].items() if "bits" in record and ".experts." not in name]
    assert kept == dict.fromkeys(linear, 3)
    assert not any("columns" in record for record in swquant.inspect(plain)["tensors"].values())
    restored = swquant.load(out).state_dict()
    sidecar = SidecarReader(out / SIDECAR)
    with open_checkpoint(model) as original, open_checkpoint(out) as compressed:
        for name in kept:
            patch = sidecar.read(COLUMNS, name, tuple(original.tensors[name].shape))
            assert isinstance(patch, Columns)
            columns = patch.cols.long()
            assert torch.equal(compressed.read(name)[:, columns], patch.values)
            if "scaled" not in manifest["tensors"][name]:
                assert torch.equal(patch.values, original.read(name)[:, columns])
            if name in restored:
                assert torch.equal(restored[name][:, columns], patch.values)
    sidecar.close()
    errors = [
        swquant.inspect(folder)["tensors"][name]["output_error"] for folder in (out, plain) for name in list(kept)[:8]
    ]
    assert sum(errors[: len(errors) // 2]) < sum(errors[len(errors) // 2 :])


def test_damaged_columns_are_reported_and_not_loaded(bf16_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swquant.compress(bf16_llama.folder, out, block="32", prompt=PROMPT, keep_columns=2)
    (out / SIDECAR).unlink()
    assert swquant.verify(out) == [f"{SIDECAR}: listed in the manifest, but not there"]
    with pytest.raises(swquant.SwquantError, match="missing"):
        swquant.load(out)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"keep_columns": 65}, "outside 0 to 64"),
        ({"keep_columns": -1}, "outside 0 to 64"),
        ({"keep_columns": 2, "restore": False}, "needs the sidecar"),
        ({"keep_columns": 2, "preset": "fast"}, "needs the sidecar and what the prompt shows"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_kept_are_refused_at_once(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(swquant.SwquantError, match=problem):
        CompressOptions(**options)
