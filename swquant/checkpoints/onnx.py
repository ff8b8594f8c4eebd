"""An exported ONNX folder: configuration and tokenizer as of any model, but a graph instead of tensors.

It can be run (`swquant.models.onnx_model`), not read tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path

from exporters.errors import SwquantError
from exporters.json_file import read_json
from exporters.onnx.files import MODEL
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.companions import copy_companions
from swquant.checkpoints.configuration import load_config
from swquant.checkpoints.manifest import is_onnx, read_manifest

__all__ = ["OnnxFolder"]


class OnnxFolder(ModelFolder):
    """The folder that `export` writes."""

    def __init__(self, folder: Path, *, restored: bool = True, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        if not restored:
            raise SwquantError(f"{self.name}: the outliers are part of the graph; leave --no-restore out")
        self.trust_remote_code = trust_remote_code
        manifest = read_manifest(folder)
        if not is_onnx(manifest):
            raise SwquantError(f"{self.name}: {MODEL} does not belong to this folder, its manifest says; take it away")
        self.manifest = manifest
        self.fingerprint = manifest["digest"]
        self.raw_config = read_json(folder / "config.json")
        self.config = load_config(folder, self.raw_config, self.name, trust_remote_code)

    @property
    def graph(self) -> Path:
        """The file that a runtime opens."""
        return self.folder / MODEL

    def save_companions(self, folder: Path) -> None:
        copy_companions(self.folder, folder, code=self.trust_remote_code)

    def close(self) -> None:
        pass
