"""MLX, from end to end: a compressed checkpoint becomes the folder that mlx-lm reads.

Codes and scales are copied, nothing is rounded again. MLX has no sidecar: outliers are left out, which is said, and
their codes stand for them; blocks that `tune` trained change what a model says, so a checkpoint with some is refused.
`compress --format mlx` goes by way of a checkpoint with a real offset for every group, which MLX holds as it is.

mlx-lm looks at the folder's own files; `swquant/manifest.json` below it says what it is, with a hash of each of them,
so that `verify` and `inspect` know it and `--overwrite` may replace it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrationless import Group
from exporters import mlx
from exporters.errors import SwquantError
from exporters.json_file import write_json
from exporters.safetensors_file import FileRecord, SafetensorsWriter
from exporters.sidecar import SETS
from swquant.checkpoints.base import Stored
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import rounded, write_manifest
from swquant.checkpoints.schema import FileEntry, MlxContent, MlxManifest
from swquant.compress.pipeline import written
from swquant.compress.prepared import Prepared
from swquant.models.architecture import describe
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import check_result, file_table
from swquant.progress import Progress, silent
from swquant.version import __version__

__all__ = ["MlxFolder", "check_plan", "export_mlx", "write_mlx"]

_SHARD = 5_000_000_000  # bytes of one file of weights
_OURS = ("swquant", "quantization_config", "torch_dtype")
Form = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class MlxFolder:
    """A finished folder and its manifest."""

    path: Path
    manifest: MlxManifest


def check_plan(prepared: Prepared) -> None:
    """Raise SwquantError for a plan that MLX cannot hold, before hours are spent on it."""
    plan = prepared.plan
    for tensor in plan.quantized:
        assert tensor.block is not None
        carried, inputs = plan.options.layout.express(tensor.block, tensor.shape), tensor.shape[1]
        group = carried.size if isinstance(carried, Group) else inputs
        problem = mlx.why_not(tensor.bits, group, zero_points=not plan.options.symmetric)
        if problem or tensor.transposed:
            raise _refused(prepared.checkpoint.name, tensor.name, problem or _TURNED)


_TURNED = "a Conv1D, which it turns around while it loads"


def _refused(model: str, name: str, what: str) -> SwquantError:
    return SwquantError(f"{model}: MLX cannot hold {name} ({what}); compress with --format mlx --block 64, or use GGUF")


def write_mlx(
    prepared: Prepared, out: Path, *, overwrite: bool = False, fresh: bool = False, progress: Progress = silent
) -> MlxFolder:
    """Carry out a plan; the checkpoint on the way is kept only where the export fails. Raises SwquantError."""
    source = prepared.checkpoint
    check_destination(out, overwrite, source)
    check_plan(prepared)
    with (
        written(prepared, out, fresh=fresh, progress=progress) as made,
        CompressedCheckpoint(made.path, trust_remote_code=source.trust_remote_code) as checkpoint,
    ):
        return export_mlx(checkpoint, out, overwrite=overwrite, progress=progress)


def export_mlx(
    checkpoint: CompressedCheckpoint, out: Path, *, overwrite: bool = False, progress: Progress = silent
) -> MlxFolder:
    """Export a checkpoint. `out` appears whole or not at all. Raises SwquantError for what MLX cannot hold."""
    check_destination(out, overwrite, checkpoint)
    left_out, schemes = _left_out(checkpoint), _schemes(checkpoint)
    forms = [form for name in checkpoint.tensors for form in _forms(checkpoint, name, schemes.get(name))]
    size = sum(Stored(dtype, shape).nbytes for _, dtype, shape in forms)
    check_space(out, size)
    said = mlx.quantization_config({_module(name): (scheme.bits, scheme.group) for name, scheme in schemes.items()})
    with writing(out, size), unfinished(out) as folder:
        written = _write_weights(checkpoint, schemes, folder, size, progress)
        checkpoint.save_companions(folder)
        config = {key: value for key, value in checkpoint.raw_config.items() if key not in _OURS}
        write_json(
            folder / "config.json", {**config, "quantization": said, "quantization_config": said}, constants=True
        )
        (folder / "swquant").mkdir()
        manifest = write_manifest(
            folder, _content(checkpoint, said, left_out, len(schemes), file_table(folder, written))
        )
        check_result(folder, out, progress)
        replace(folder, out, overwrite)
    return MlxFolder(out, manifest)


def _content(
    checkpoint: CompressedCheckpoint,
    said: Mapping[str, Any],
    left_out: list[str],
    quantized: int,
    files: dict[str, FileEntry],
) -> MlxContent:
    """What the manifest says. said: the `quantization` of config.json; quantized: how many tensors are."""
    return {
        "kind": "mlx",
        "swquant": __version__,
        "source": {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
        "compression": {"source": checkpoint.manifest["source"], "options": checkpoint.manifest["options"]},
        "detection": checkpoint.manifest["detection"],
        "bits": said["bits"],
        "group_size": said["group_size"],
        "quantized": quantized,
        "dense": len(checkpoint.tensors) - quantized,
        "left_out": left_out,
        "totals": {"bytes": sum(record["bytes"] for record in files.values())},
        "tensors": {},
        "files": files,
    }


@dataclass(frozen=True)
class _Scheme:
    """How a rounded tensor is stored: bits, inputs that share a scale, and the dtype of scales."""

    bits: int
    group: int
    dtype: torch.dtype


def _schemes(checkpoint: CompressedCheckpoint) -> dict[str, _Scheme]:
    """Of every rounded tensor. Raises SwquantError for the first that MLX cannot hold."""
    schemes: dict[str, _Scheme] = {}
    architecture = describe(checkpoint)
    for name in checkpoint.quantized_names:
        record, parts = checkpoint.manifest["tensors"][name], checkpoint.part_forms(name)
        assert "dense" not in record
        scales = parts.get("weight_scale", parts.get("scales"))
        assert scales is not None
        group = record["shape"][1] // scales.shape[1]
        problem = mlx.why_not(record["bits"], group, zero_points="weight_zero_point" in parts)
        linear = architecture.weights.get(name)
        if problem or (linear is not None and linear.transposed):
            raise _refused(checkpoint.name, name, problem or _TURNED)
        schemes[name] = _Scheme(record["bits"], group, scales.dtype)
    return schemes


def _forms(checkpoint: CompressedCheckpoint, name: str, scheme: _Scheme | None) -> list[Form]:
    """What is written of a tensor: (name, dtype, shape)."""
    stored = checkpoint.tensors[name]
    if scheme is None:
        return [(name, stored.dtype, stored.shape)]
    parts = mlx.tensor_layout((stored.shape[0], stored.shape[1]), scheme.group, scheme.bits, scheme.dtype)
    return [(f"{_module(name)}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]


def _write_weights(
    checkpoint: CompressedCheckpoint,
    schemes: Mapping[str, _Scheme],
    folder: Path,
    size: int,
    progress: Progress,
) -> dict[str, FileRecord]:
    """Shards of at most 5 GB, and their index, as mlx-lm writes them. Returns the shards' hashes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in checkpoint.tensors:
        nbytes = sum(Stored(*form[1:]).nbytes for form in _forms(checkpoint, name, schemes.get(name)))
        if shards[-1] and filled + nbytes > _SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    where: dict[str, str] = {}
    written: dict[str, FileRecord] = {}
    with progress.bytes("Writing", size) as bar:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            forms = [form for name in names for form in _forms(checkpoint, name, schemes.get(name))]
            with closing(SafetensorsWriter(folder / file, forms, {"format": "mlx"})) as writer:
                for name in names:
                    for part, tensor in _tensors(checkpoint, name, rounded=name in schemes):
                        writer.write(part, tensor)
                        bar.advance(part, tensor.nbytes)
                written[file] = writer.finish()
            where |= {form[0]: file for form in forms}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return written


def _tensors(checkpoint: CompressedCheckpoint, name: str, *, rounded: bool) -> Iterator[tuple[str, Tensor]]:
    if not rounded:
        yield name, checkpoint.read(name)
        return
    for part, tensor in mlx.to_tensors(checkpoint.quantized(name)).items():
        yield f"{_module(name)}.{part}", tensor


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _left_out(checkpoint: CompressedCheckpoint) -> list[str]:
    """What the checkpoint has and MLX has not. Raises SwquantError for trained blocks."""
    for name in checkpoint.sets:
        if name not in SETS:
            raise SwquantError(
                f"{checkpoint.name}: MLX has no place for the blocks {name} that tune trained; export the checkpoint that they "
                "were trained on, or use GGUF with a --type"
            )
    kept = sum(record["outliers"] for record in rounded(checkpoint.manifest["tensors"]).values())
    lost = [f"{kept} outliers that the sidecar keeps exactly: their codes stand for them"] if kept else []
    if checkpoint.manifest["activations"] is not None:
        lost.append("rounded activations: MLX computes with float inputs")
    return lost
