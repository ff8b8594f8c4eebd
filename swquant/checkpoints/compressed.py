"""A checkpoint that swquant wrote, read back as the dense model it stands for.

`read` decodes a tensor and lays the sidecar over it, under the original's stored names: whatever can read the
original (transformers, the probe, the evaluation) can read the compressed model the same way. `quantized` and `outliers`
give the parts, for exporters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibrationless import Outliers, QuantizedTensor, dequantize, restore
from exporters import compressed_tensors
from exporters.errors import SwquantError
from exporters.json_file import read_json
from exporters.safetensors_file import SafetensorsReader
from exporters.sidecar import SIDECAR, SidecarReader
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.manifest import outlier_counts, read_manifest
from swquant.checkpoints.safetensors import copy_companions, load_config, shard_names

__all__ = ["CompressedCheckpoint"]


class CompressedCheckpoint(Checkpoint):
    """Reads the folder that `compress` writes. restored: whether `read` lays the outliers back. unrounded: decode to float32;
    otherwise every weight is rounded to the dtype of its scale, as stock loaders of the format do and runtimes do not."""

    kind = "swquant"

    def __init__(
        self, folder: Path, *, restored: bool = True, unrounded: bool = False, trust_remote_code: bool = False
    ) -> None:
        self.folder = folder
        self._unrounded = unrounded
        self.restored = restored
        self.name = folder.resolve().name
        self.trust_remote_code = trust_remote_code
        self.manifest = read_manifest(folder)
        self.fingerprint = self.manifest["digest"]
        self._records: dict[str, dict[str, Any]] = self.manifest["tensors"]
        self.raw_config = read_json(folder / "config.json")
        self.config = load_config(folder, self.raw_config, self.name, trust_remote_code)
        for key in ("quantization_config", "swquant"):
            if hasattr(self.config, key):
                delattr(self.config, key)
        self._readers: dict[str, SafetensorsReader] = {}
        self._sidecar: SidecarReader | None = None
        try:
            for shard in shard_names(folder):
                self._readers[shard] = SafetensorsReader(folder / shard)
            self._sidecar = self._open_sidecar() if restored else None
            self.tensors = {name: self._stored(name, record) for name, record in self._records.items()}
        except BaseException:
            self.close()
            raise

    def _open_sidecar(self) -> SidecarReader | None:
        """The sidecar, if the model has outliers. Raises SwquantError unless it holds exactly those that were written: a
        model without some of its outliers is another model."""
        expected = outlier_counts(self.manifest)
        if not expected:
            return None
        if not (self.folder / SIDECAR).is_file():
            raise SwquantError(f"{self.name}: {SIDECAR} is missing; fetch it again, or load without it (--no-restore)")
        sidecar = SidecarReader(self.folder / SIDECAR)
        if sidecar.counts != expected:
            sidecar.close()
            raise SwquantError(
                f"{self.name}: {SIDECAR} does not hold the outliers that the manifest counts; fetch it again, "
                "or load without it (--no-restore)"
            )
        return sidecar

    def _reader(self, name: str) -> SafetensorsReader:
        shard = self._records[name].get("file")
        if shard not in self._readers:
            raise SwquantError(f"{self.name}: {name} is said to be in {shard}, which is not part of the checkpoint")
        reader = self._readers[shard]
        if lost := [part for part in self._records[name]["sha256"] if part not in reader.entries]:
            raise SwquantError(f"{self.name}: {shard} lacks {lost[0]}; run swquant verify")
        return reader

    def _stored(self, name: str, record: dict[str, Any]) -> Stored:
        reader = self._reader(name)
        if "dense" in record:
            entry = reader.entries[name]
            return Stored(entry.dtype, entry.shape)
        stored = reader.entries[f"{name.removesuffix('.weight')}.weight_scale"].dtype
        return Stored(torch.float32 if self._unrounded else stored, tuple(record["shape"]))

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """The tensors that are stored as codes."""
        return tuple(name for name, record in self._records.items() if "dense" not in record)

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes, scales and zero points of a tensor. Raises SwquantError where they contradict each other."""
        record, reader, module = self._records[name], self._reader(name), name.removesuffix(".weight")
        parts = {part.removeprefix(f"{module}."): reader.read(part) for part in record["sha256"]}
        try:
            return compressed_tensors.from_tensors(parts, int(record["bits"]))
        except (KeyError, ValueError) as error:
            raise SwquantError(f"{self.name}: {name} is damaged ({error}); run swquant verify") from None

    def outliers(self, name: str) -> Outliers | None:
        """The points of a tensor's sidecar; None where it has none or they are not to be restored."""
        if self._sidecar is None or name not in self._sidecar.tensors:
            return None
        return self._sidecar.read(name)

    def read(self, name: str) -> torch.Tensor:
        if "dense" in self._records[name]:
            return self._reader(name).read(name)
        quantized = self.quantized(name)
        if self._unrounded:
            quantized = replace(quantized, scale=quantized.scale.to(torch.float32))
        weight = dequantize(quantized)
        if (outliers := self.outliers(name)) is not None:
            try:
                restore(weight, outliers)
            except ValueError as error:
                raise SwquantError(f"{self.name}: {name}: {error}; run swquant verify") from None
        return weight

    def save_companions(self, folder: Path) -> None:
        copy_companions(self.folder, folder)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        if self._sidecar is not None:
            self._sidecar.close()
