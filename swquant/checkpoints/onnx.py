"""An exported ONNX folder: configuration and tokenizer as of any checkpoint, but a graph instead of tensors.

It can be run (`swquant.onnx_model`), not read tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch

from exporters.errors import SwquantError
from exporters.json_file import read_json
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.manifest import read_manifest
from swquant.checkpoints.safetensors import load_config

__all__ = ["GRAPH", "OnnxCheckpoint"]

GRAPH = "model.onnx"


class OnnxCheckpoint(Checkpoint):
    """The folder that `export` writes."""

    kind = "onnx"

    def __init__(self, folder: Path, *, restored: bool = True, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        if not restored:
            raise SwquantError(f"{self.name}: the outliers are part of the graph; leave --no-restore out")
        self.trust_remote_code = trust_remote_code
        self.manifest = read_manifest(folder)
        self.fingerprint = self.manifest["digest"]
        self.raw_config = read_json(folder / "config.json")
        self.config = load_config(folder, self.raw_config, self.name, trust_remote_code)
        self.tensors = {}

    @property
    def graph(self) -> Path:
        """The file that a runtime opens."""
        return self.folder / GRAPH

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""
        path = self.folder / "generation_config.json"
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        ids = ids if ids is not None else self.config.get_text_config().eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)

    def read(self, name: str) -> torch.Tensor:
        raise SwquantError(
            f"{self.name}: an ONNX graph holds no tensor {name}; use the checkpoint that it was made from"
        )

    def save_companions(self, folder: Path) -> None:
        raise SwquantError(f"{self.name}: already exported; use the checkpoint that it was made from")

    def close(self) -> None:
        pass
