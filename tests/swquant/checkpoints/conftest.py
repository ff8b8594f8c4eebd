"""A checkpoint, an ONNX folder and one for MLX whose manifests have every key: made once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.exported import compressed_model
from support.tiny_models import PROMPT, Planted

import swquant


@pytest.fixture(scope="session")
def int8(bf16_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose records have everything that they can have."""
    out = tmp_path_factory.mktemp("int8") / "out"
    options: dict[str, Any] = {"activations": "int8", "activation_range": "static"}
    return swquant.compress(
        bf16_llama.folder, out, prompt=PROMPT, block="32", dense=("layers.0.self_attn",), **options
    ).path


@pytest.fixture(scope="session")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = compressed_model("llama", tmp_path_factory.mktemp("llama"))
    return swquant.export(checkpoint, checkpoint.parent / "onnx", graph="genai").path


@pytest.fixture(scope="session")
def mlx(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for MLX, without the outliers of its checkpoint."""
    return swquant.export(compressed, tmp_path_factory.mktemp("mlx") / "out", format="mlx").path
