"""A checkpoint that swquant wrote, read back as the dense model it stands for.

`read` decodes a tensor and lays the sidecar's patches over it, under the original's stored names: whatever can read the
original (transformers, the probe, the evaluation) can read the compressed model the same way. `quantized` and `patches`
give the parts, for exporters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from calibrationless import Blocks, Patch, QuantizedTensor, dequantize, restore
from exporters import layouts
from exporters.errors import CheckpointError, SwquantError
from exporters.json_file import read_json
from exporters.safetensors_file import SafetensorsReader
from exporters.sidecar import SidecarReader
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.checkpoints.companions import copy_companions
from swquant.checkpoints.configuration import handed_on, load_config
from swquant.checkpoints.manifest import MANIFEST, is_checkpoint, read_manifest
from swquant.checkpoints.origin import front_matter, repository_id
from swquant.checkpoints.patch_sets import open_patches
from swquant.checkpoints.pool import AUTO, ChosenSet, pool_of, set_of
from swquant.checkpoints.schema import TensorRecord
from swquant.checkpoints.shards import shard_names
from swquant.checkpoints.stored import check_decoded, check_dense, check_hashes

__all__ = ["CompressedCheckpoint"]

# Kind of a folder that was exported -> what is said of it here, where tensors are wanted.
_ELSEWHERE = {
    "onnx": f"{MANIFEST} is that of an ONNX folder, but the graph is missing; fetch it again",
    "mlx": "a folder for MLX, which mlx-lm reads (mlx_lm.generate); here, give the model or checkpoint that it was made from",
    "patches": "holds patches alone; swquant merge writes the whole model: swquant merge PATCHES OUT --base MODEL",
}


class CompressedCheckpoint(Checkpoint):
    """Reads the folder that `compress` writes. name: for people, the folder's by default. restored: whether `read` lays
    the patches over. unrounded: decode to float32; otherwise every weight is rounded to the dtype of its scale, as
    stock loaders of the format do and runtimes do not. task: lays the set of the pool
    that serves it over all other patches; `auto` leaves it to the input which (`models.routing`)."""

    kind = "swquant"

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        restored: bool = True,
        unrounded: bool = False,
        task: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self._unrounded = unrounded
        self.restored = restored
        self.name = name or folder.resolve().name
        self.trust_remote_code = trust_remote_code
        manifest = read_manifest(folder)
        if not is_checkpoint(manifest):
            raise SwquantError(f"{self.name}: {_ELSEWHERE[manifest['kind']]}")
        self.manifest = manifest
        self.fingerprint = manifest["digest"]
        self._records = manifest["tensors"]
        raw = read_json(folder / "config.json")
        self.raw_config = handed_on(raw, code=trust_remote_code)
        self.config = load_config(folder, raw, self.name, trust_remote_code)
        for key in ("quantization_config", "swquant"):
            if hasattr(self.config, key):
                delattr(self.config, key)
        self._readers: dict[str, SafetensorsReader] = {}
        self._sidecar: SidecarReader | None = None
        self._chosen: ChosenSet | None = None
        self.task = task
        try:
            for shard in shard_names(folder):
                self._readers[shard] = SafetensorsReader(folder / shard)
            self._sidecar = open_patches(folder, self.manifest, self.name) if restored else None
            self._chosen = self._choose(task)
            self.tensors = {name: self._stored(name, record) for name, record in self._records.items()}
        except BaseException:
            self.close()
            raise

    def _choose(self, task: str | None) -> ChosenSet | None:
        if task is None:
            return None
        if not self.restored:
            raise SwquantError(f"{self.name}: --task lays blocks over the weights, --no-restore none; leave out one")
        if task == AUTO:
            pool_of(self.manifest, self.name)
            return None
        of_set = set_of(self.manifest, task, self.name)
        return None if of_set is None else ChosenSet(self.folder, self.manifest, of_set, self.name)

    @property
    def is_compressed(self) -> bool:
        return True

    @property
    def repository(self) -> str | None:
        return repository_id(front_matter(self.folder).get("base_model"))

    def _reader(self, name: str, *parts: str) -> SafetensorsReader:
        """What reads a tensor's file. Raises SwquantError unless that holds what the manifest says, and these parts."""
        shard = self._records[name]["file"]
        if shard not in self._readers:
            raise SwquantError(f"{self.name}: {name} is said to be in {shard}, which is not part of the checkpoint")
        reader = self._readers[shard]
        if lost := [part for part in (*self._records[name]["sha256"], *parts) if part not in reader.entries]:
            raise SwquantError(f"{self.name}: {shard} lacks {lost[0]}; run swquant verify")
        return reader

    def _stored(self, name: str, record: TensorRecord) -> Stored:
        if "dense" in record:
            entry = self._reader(name, name).entries[name]
            return Stored(entry.dtype, entry.shape)
        if len(record["shape"]) != 2:
            raise SwquantError(f"{self.name}: {name} has the shape {record['shape']}, which no rounded weight has")
        module = name.removesuffix(".weight")
        entries = self._reader(name).entries
        parts = {part.removeprefix(f"{module}."): entries[part].dtype for part in record["sha256"]}
        dtype = layouts.decoded_dtype(parts)
        if dtype is None:
            raise SwquantError(f"{self.name}: {name} has no scales; run swquant verify")
        return Stored(torch.float32 if self._unrounded else dtype, tuple(record["shape"]))

    def part_forms(self, name: str) -> dict[str, Stored]:
        """Local name -> form of the parts of a rounded tensor, read from the header of its file."""
        entries, module = self._reader(name).entries, name.removesuffix(".weight")
        return {
            part.removeprefix(f"{module}."): Stored(entries[part].dtype, entries[part].shape)
            for part in self._records[name]["sha256"]
        }

    @property
    def quantized_names(self) -> tuple[str, ...]:
        """The tensors that are stored as codes."""
        return tuple(name for name, record in self._records.items() if "dense" not in record)

    def packed(self, name: str) -> tuple[dict[str, torch.Tensor], int, tuple[int, int]]:
        """Local name -> tensor of a rounded tensor as its file holds it, its bits and its shape: what
        `exporters.layouts.from_tensors` takes. Raises SwquantError where a hash differs."""
        record, reader, module = self._records[name], self._reader(name), name.removesuffix(".weight")
        assert "dense" not in record
        tensors = {stored: reader.read(stored) for stored in record["sha256"]}
        try:
            check_hashes(name, record, tensors)
        except CheckpointError as error:
            raise SwquantError(f"{self.name}: {error}") from None
        rows, cols = record["shape"]
        return (
            {stored.removeprefix(f"{module}."): tensor for stored, tensor in tensors.items()},
            record["bits"],
            (rows, cols),
        )

    def quantized(self, name: str) -> QuantizedTensor:
        """The codes, scales and zero points of a tensor. Raises SwquantError where they contradict each other."""
        parts, bits, shape = self.packed(name)
        try:
            return layouts.from_tensors(parts, bits, shape)
        except ValueError as error:
            raise SwquantError(f"{self.name}: {name} is damaged ({error}); run swquant verify") from None

    def patches(self, name: str, *without: str | None) -> tuple[Patch, ...]:
        """What is laid over a tensor, in order; nothing where patches are not to be restored. without: sets that are
        left out. Raises SwquantError where a patch does not fit."""
        sidecar, chosen = self._sidecar, self._chosen
        if sidecar is not None and name not in sidecar.tensors:
            sidecar = None
        if chosen is not None and name not in chosen.weights:
            chosen = None
        if sidecar is None and chosen is None:
            return ()
        shape = self._records[name]["shape"]
        if len(shape) != 2:
            raise SwquantError(f"{self.name}: {name} has patches, but is no matrix; run swquant verify")
        try:
            laid = () if sidecar is None else sidecar.read_all(name, (shape[0], shape[1]), *without)
            return laid if chosen is None else (*laid, *chosen.blocks(name, (shape[0], shape[1])))
        except CheckpointError as error:
            raise SwquantError(f"{error}; run swquant verify") from None

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of patches, in the order in which they are laid over a weight; none where they are not restored."""
        return () if self._sidecar is None else tuple(self._sidecar.counts)

    def blocks(self, of_set: str) -> dict[str, Blocks]:
        """Stored name -> blocks of a set."""
        assert self._sidecar is not None
        found: dict[str, Blocks] = {}
        for name in self._sidecar.counts[of_set]:
            rows, cols = self._records[name]["shape"]
            patch = self._sidecar.read(of_set, name, (rows, cols))
            assert isinstance(patch, Blocks)
            found[name] = patch
        return found

    def read(self, name: str) -> torch.Tensor:
        return self.read_without(name)

    def read_without(self, name: str, *without: str | None) -> torch.Tensor:
        """`read` as if some sets of patches were not there."""
        if "dense" in (record := self._records[name]):
            tensor = self._reader(name).read(name)
            try:
                check_dense(name, record, tensor)
                check_hashes(name, record, {name: tensor})
            except CheckpointError as error:
                raise SwquantError(f"{self.name}: {error}") from None
            patches = self.patches(name, *without)
            return restore(tensor, *patches) if patches else tensor
        quantized = self.quantized(name)
        if self._unrounded:
            offset = None if quantized.offset is None else quantized.offset.to(torch.float32)
            quantized = replace(quantized, scale=quantized.scale.to(torch.float32), offset=offset)
        weight = restore(dequantize(quantized), *self.patches(name, *without))
        try:
            check_decoded(name, weight)
        except CheckpointError as error:
            raise SwquantError(f"{self.name}: {error}") from None
        return weight

    def save_companions(self, folder: Path) -> None:
        copy_companions(self.folder, folder, code=self.trust_remote_code)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        for opened in (self._sidecar, self._chosen):
            if opened is not None:
                opened.close()
