"""A Hugging Face folder: config.json, one or many safetensors shards, a tokenizer.

Nothing in the folder is trusted: the index may name only plain files beside it, every header is checked by
`exporters.SafetensorsReader`, and pickle files are never opened.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from exporters.errors import SwquantError, first_line
from exporters.json_file import read_json
from exporters.safetensors_file import SafetensorsReader
from swquant.checkpoints.base import Checkpoint, Stored

__all__ = ["COMPANIONS", "SafetensorsCheckpoint", "copy_companions", "load_config", "shard_names"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Everything a loader may want beside the weights; weights and our own files are written, not copied.
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "generation_config.json", "chat_template*", "preprocessor_config.json", "processor_config.json", "LICENSE*",
)  # fmt: skip


def shard_names(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the model in `folder`, checked against its index."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise SwquantError(f"{folder / INDEX}: weight_map is not a table of names; fetch or save the model again")
        names = tuple(sorted(set(weight_map.values())))
        for name in names:
            if Path(name).name != name or name in ("", ".", "..") or "\\" in name or not name.endswith(".safetensors"):
                raise SwquantError(f"{folder / INDEX}: {name!r} is not the name of a safetensors file beside it")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SwquantError(
                f"{folder.name}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; fetch the model again"
            )
        return names
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise SwquantError(
            f"{folder.name}: only pickle weights ({pickles[0]}), which can run code when opened; load the model in "
            "transformers where you trust it and save it again with save_pretrained()"
        )
    raise SwquantError(
        f"{folder.name}: no {SINGLE} and no {INDEX}; give a folder saved by save_pretrained(), or a .gguf file"
    )


def load_config(folder: Path, raw: Mapping[str, Any], name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The transformers configuration of a folder whose config.json is `raw`. Runs code of the folder only where that is
    trusted. A model that transformers knows by itself needs none, even if it brings some."""
    if raw.get("auto_map") and str(raw.get("model_type")) not in CONFIG_MAPPING and not trust_remote_code:
        raise SwquantError(
            f"{name}: the model brings Python code of its own, which was not run; "
            "read it, and if you trust it, add --trust-remote-code"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(f"{name}: config.json is not usable ({first_line(error)}); fetch it again") from None


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a loader wants beside the weights: tokenizer, generation configuration, chat template, license."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)


class SafetensorsCheckpoint(Checkpoint):
    """Reads shard by shard, one tensor at a time."""

    kind = "safetensors"

    def __init__(self, folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self.trust_remote_code = trust_remote_code
        if not (folder / "config.json").is_file():
            raise SwquantError(
                f"{self.name}: no config.json; give a folder saved by save_pretrained(), or a .gguf file"
            )
        self.raw_config = read_json(folder / "config.json")
        self._readers: dict[str, SafetensorsReader] = {}
        self._where: dict[str, str] = {}
        try:
            self._open()
            self._refuse_quantized()
            self.config = load_config(folder, self.raw_config, self.name, trust_remote_code)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.folder / "config.json", *(self.folder / shard for shard in self._readers))

    @property
    def can_stay_on_disk(self) -> bool:
        return True

    def _refuse_quantized(self) -> None:
        if quantized := self.raw_config.get("quantization_config"):
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
            raise SwquantError(f"{self.name}: already quantized ({method}); start from the original model")

    def _open(self) -> None:
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in shard_names(self.folder):
            reader = self._readers[shard] = SafetensorsReader(self.folder / shard)
            for name in reader.entries:
                if name in self._where:
                    raise SwquantError(
                        f"{self.name}: {name} is in {self._where[name]} and in {shard}; delete the stale shard"
                    )
                self._where[name] = shard
            digest.update(f"{shard} {reader.header_sha256}\n".encode())
        if (self.folder / INDEX).is_file():
            listed = read_json(self.folder / INDEX)["weight_map"]
            if lost := sorted(name for name, shard in listed.items() if self._where.get(name) != shard):
                raise SwquantError(
                    f"{self.name}: the index promises {lost[0]} in {listed[lost[0]]}, which does not hold it; fetch the model again"
                )
        self.tensors: Mapping[str, Stored] = {
            name: Stored(entry.dtype, entry.shape)
            for shard in self._readers.values()
            for name, entry in shard.entries.items()
        }
        self.fingerprint = digest.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        return self._readers[self._where[name]].read(name)

    def save_companions(self, folder: Path) -> None:
        copy_companions(self.folder, folder)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
