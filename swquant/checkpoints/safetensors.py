"""A Hugging Face folder: config.json, one or many safetensors shards, a tokenizer.

Nothing in the folder is trusted: the index may name only plain files beside it, every header is checked by
`exporters.SafetensorsReader`, and pickle files are never opened. What lies beside the weights is `companions`'
business, which folders are not taken `refusals`'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from exporters.json_file import read_json
from exporters.safetensors_file import SafetensorsReader
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.companions import copy_companions, left_behind
from swquant.checkpoints.configuration import attention_note, handed_on, load_config
from swquant.checkpoints.refusals import refuse_adapters, refuse_no_config, refuse_quantized, refuse_quantized_mlx
from swquant.checkpoints.shards import holders, shard_names

__all__ = ["SafetensorsCheckpoint"]


class SafetensorsCheckpoint(Checkpoint):
    """Reads shard by shard, one tensor at a time."""

    kind = "safetensors"

    def __init__(self, folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self.trust_remote_code = trust_remote_code
        refuse_no_config(folder, self.name)
        refuse_adapters(folder, self.name)
        raw = read_json(folder / "config.json")
        refuse_quantized_mlx(raw, self.name)
        self._attention = attention_note(raw)
        self.raw_config = handed_on(raw, code=trust_remote_code)
        self._readers: dict[str, SafetensorsReader] = {}
        self._where: dict[str, str] = {}
        try:
            self._open()
            refuse_quantized(folder, self.name, raw, self.tensors)
            self.config = load_config(folder, raw, self.name, trust_remote_code)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.folder / "config.json", *(self.folder / shard for shard in self._readers))

    @property
    def can_stay_on_disk(self) -> bool:
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        lost = left_behind(self.folder, frozenset(self._readers), code=self.trust_remote_code)
        return tuple(note for note in (self._attention, lost) if note is not None)

    def _open(self) -> None:
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in shard_names(self.folder):
            reader = self._readers[shard] = SafetensorsReader(self.folder / shard)
            digest.update(f"{shard} {reader.header_sha256}\n".encode())
        self._where = holders(self.folder, self.name, {name: reader.entries for name, reader in self._readers.items()})
        self.tensors: Mapping[str, Stored] = {
            name: Stored(entry.dtype, entry.shape)
            for name, shard in self._where.items()
            for entry in [self._readers[shard].entries[name]]
        }
        self.fingerprint = digest.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        return self._readers[self._where[name]].read(name)

    def save_companions(self, folder: Path) -> None:
        copy_companions(self.folder, folder, code=self.trust_remote_code)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
