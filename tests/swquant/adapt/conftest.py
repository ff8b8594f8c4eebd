"""A small compressed model, texts of several tasks for it, and a pool that has learned two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tasks import QUICK, file_of
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama at 4 bits. Do not change it."""
    folder = tmp_path_factory.mktemp("adapt")
    original = save_model(tiny_model("llama", num_hidden_layers=2), folder / "original", torch.bfloat16)
    return swquant.compress(original, folder / "c", prompt=PROMPT, block="32", outliers=0.002).path


@pytest.fixture(scope="session")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, with a set for `low` and one for `high`. Do not change it."""
    folder = tmp_path_factory.mktemp("pool")
    tasks = {task: file_of(folder, task) for task in ("low", "high")}
    swquant.adapt(base, folder / "pool", tasks, policy="grow", **QUICK)
    return folder / "pool"
