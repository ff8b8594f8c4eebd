"""One tensor's result is a value: made in other processes, it gives the same checkpoint byte for byte."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import PROMPT, Planted

import swquant
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
    {"symmetric": False},
    {"bits": 8, "activations": "int8"},
]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [preset if "texts" in preset else pytest.param(preset, marks=pytest.mark.slow) for preset in PRESETS],
    ids=str,
)
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
    swquant.compress(bf16_llama.folder, tmp_path / "out", block="32", prompt=PROMPT, outliers=0.01)
    assert {plan.name for plan, _ in made} == set(swquant.inspect(tmp_path / "out")["tensors"])
    for plan, rounded in made:
        assert rounded.name == plan.name
        assert {name: (part.dtype, tuple(part.shape)) for name, part in rounded.parts.items()} == dict(plan.layout)
        assert {name: len(patch) for name, patch in rounded.patches.items()} == {
            patch.set: patch.count for patch in plan.patches
        }
        assert (rounded.error is None) == (plan.recipe is None)
