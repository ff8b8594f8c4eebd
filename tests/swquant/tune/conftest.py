"""A small model whose 2-bit rounding hurts, to be recovered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny llama, and itself at 2 bits. Do not change them."""
    folder = tmp_path_factory.mktemp("tune")
    original = save_model(tiny_model("llama", num_hidden_layers=3), folder / "original", torch.bfloat16)
    return original, swquant.compress(original, folder / "c", prompt=PROMPT, bits=2, block="32", outliers=0.002).path
