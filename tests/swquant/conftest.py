"""Checkpoints that many tests only read: made once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT, Planted, plant, planted_model, save_model, tiny_model

import swquant


@pytest.fixture(scope="session")
def bf16_llama(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A llama with a super weight, in bfloat16."""
    return planted_model("llama", tmp_path_factory.mktemp("bf16") / "tiny", torch.bfloat16)


@pytest.fixture(scope="session")
def compressed(bf16_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, at 4 bits with one weight in a hundred in the sidecar. Do not change it: `damaged` is a copy."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    return swquant.compress(bf16_llama.folder, out, prompt=PROMPT, outliers=0.01).path


@pytest.fixture
def damaged(compressed: Path, tmp_path: Path) -> Path:
    """A copy of `compressed` to be damaged."""
    return Path(shutil.copytree(compressed, tmp_path / "damaged"))


@pytest.fixture
def source(bf16_llama: Planted, tmp_path: Path) -> Path:
    """A copy of the uncompressed model to be damaged."""
    return Path(shutil.copytree(bf16_llama.folder, tmp_path / "source"))


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Large enough for several threads and several shards (it comes in several, too): 1.9 million weights, float32."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    name = plant(model)
    save_model(model, folder, max_shard_size="2MB")
    return Planted(folder, name, 37, 101)
