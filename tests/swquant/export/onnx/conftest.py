"""A checkpoint and its ONNX folders: made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.exported import SETTINGS, compressed_model

import swquant


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def exported(checkpoint: Path) -> Path:
    """Its ONNX folder. Do not change it."""
    return swquant.export(checkpoint, checkpoint.parent / "onnx").path


@pytest.fixture(scope="session")
def genai(checkpoint: Path) -> Path:
    """The same weights in one step, as genai's builder draws them, for the fast arithmetic."""
    source, folder = checkpoint.parent / "model", checkpoint.parent / "genai"
    onnx_folder: dict = {"format": "onnx", "offsets": "none", "graph": "genai", "accuracy_level": 4, "lm_head_bits": 8}
    return swquant.compress(source, folder, **onnx_folder, **SETTINGS).path
