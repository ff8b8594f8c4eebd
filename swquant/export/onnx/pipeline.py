"""`export`, from end to end: a compressed checkpoint becomes an ONNX folder.

    open -> torch model and its answers -> pack -> graph -> write -> run and compare -> manifest -> rename

As with `compress`, everything happens in a hidden folder beside OUT, which appears under its name when it is complete
and gives the same answers as the checkpoint. `compress --format onnx` is both: the checkpoint lives in that folder.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from calibrationless import CPU
from exporters.errors import SwquantError
from exporters.json_file import write_json
from exporters.onnx.files import GENAI_CONFIG
from exporters.onnx.nodes import DOMAIN, OPERATOR, PackedWeight, narrowed
from exporters.onnx.write import count_operators, save, weight_bytes
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import stored_as, write_manifest
from swquant.checkpoints.onnx_schema import CheckRecord, NodeRecord
from swquant.checkpoints.schema import OnnxManifest
from swquant.compress.pipeline import written
from swquant.compress.prepared import Prepared
from swquant.export.onnx.builder import check_builder
from swquant.export.onnx.check import Reference, check_export, make_long_reference, make_reference
from swquant.export.onnx.graph import dynamo_graph, embedding_scale, genai_graph, save_for_builder
from swquant.export.onnx.lengths import windows_of
from swquant.export.onnx.linears import (
    at_level_4,
    channels_of,
    check_patches,
    pack_head,
    pack_weights,
    packed_head,
    unsupported,
    watch_peaks,
)
from swquant.export.onnx.options import ExportOptions
from swquant.models.architecture import Architecture, LinearKind, describe
from swquant.models.devices import place_for
from swquant.models.loading import build_model
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import file_table
from swquant.progress import Progress, silent
from swquant.version import __version__

__all__ = ["Exported", "check_plan", "export_checkpoint", "write_exported"]


@dataclass(frozen=True)
class Exported:
    """A finished ONNX folder and its manifest."""

    path: Path
    manifest: OnnxManifest


def export_checkpoint(
    checkpoint: CompressedCheckpoint,
    out: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Exported:
    """Export a checkpoint opened with unrounded=True. `out` appears whole or not at all. device: where the torch model
    says what the file is compared with, if it fits there. Raises SwquantError."""
    check_destination(out, overwrite, checkpoint)
    options = options.resolved(checkpoint.manifest["activations"] is not None)
    check_patches(checkpoint)
    architecture = describe(checkpoint)
    _check_graph(checkpoint, architecture, options)
    _check_weights(checkpoint.name, checkpoint.quantized_names, architecture)
    _check_tables(checkpoint, architecture, options, progress)
    with (
        writing(out),
        unfinished(out) as folder,
        unfinished(out) as scratch,
    ):
        traced = _trace(checkpoint, options, scratch, device, progress)
        with progress.step("Writing"):
            check_space(out, weight_bytes(traced.graph))
            save(traced.graph, folder)
            checkpoint.save_companions(folder)
            write_json(folder / "config.json", _config(checkpoint, options), constants=True)
            if (configuration := scratch / "graph" / GENAI_CONFIG).is_file():
                shutil.copyfile(configuration, folder / configuration.name)
        with progress.step("Running it beside the checkpoint"):
            check = check_export(folder, _deltas(traced.graph), checkpoint.config, traced.reference, options)
        manifest = _write_manifest(checkpoint, folder, options, traced, check)
        replace(folder, out, overwrite)
    return Exported(out, manifest)


def check_plan(prepared: Prepared, options: ExportOptions) -> None:
    """Raise SwquantError where what is planned could be compressed but not exported, before hours are spent on it."""
    _check_graph(prepared.checkpoint, prepared.found.architecture, options)
    names = [tensor.name for tensor in prepared.plan.quantized]
    _check_weights(prepared.checkpoint.name, names, prepared.found.architecture)


def _check_weights(model: str, names: Iterable[str], architecture: Architecture) -> None:
    """Raise SwquantError for rounded weights that no node can hold."""
    for name in names:
        linear = architecture.weights.get(name)
        if name in (architecture.embedding, architecture.head):
            continue
        if linear is None or linear.kind is not LinearKind.LINEAR:
            raise unsupported(model, name)


def _check_tables(
    checkpoint: CompressedCheckpoint, architecture: Architecture, options: ExportOptions, progress: Progress
) -> None:
    """Say what becomes of a packed embedding. Raises SwquantError where a packed output head would be rounded again."""
    packed = [name for name in checkpoint.quantized_names if name in (architecture.embedding, architecture.head)]
    if architecture.head in packed and options.lm_head_bits:
        record = checkpoint.manifest["tensors"][architecture.head]
        raise SwquantError(
            f"--lm-head-bits {options.lm_head_bits}: {checkpoint.name} holds its output head as {stored_as(record)}, which "
            "the graph takes as it is; leave it out"
        )
    if architecture.embedding in packed and architecture.embedding != architecture.head:
        progress.note("The embedding's codes become floats: a graph shares those of an output head alone")


def _check_graph(checkpoint: Checkpoint, architecture: Architecture, options: ExportOptions) -> None:
    """Raise SwquantError where the chosen graph is known to be another model."""
    if options.graph == "genai":
        check_builder(checkpoint, architecture)


def write_exported(
    prepared: Prepared,
    out: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Carry out a plan and export the result; the checkpoint between the two is kept only where that fails. `out`
    appears whole or not at all. Raises SwquantError."""
    source = prepared.checkpoint
    check_destination(out, overwrite, source)
    check_plan(prepared, options)
    with (
        written(prepared, out, fresh=fresh, progress=progress) as made,
        CompressedCheckpoint(made.path, unrounded=True, trust_remote_code=source.trust_remote_code) as checkpoint,
    ):
        return export_checkpoint(
            checkpoint, out, options, overwrite=overwrite, device=prepared.device, progress=progress
        )


@dataclass(frozen=True)
class _Traced:
    """What is left of the torch model: the graph, its packed weights, and its answers."""

    graph: onnx_ir.Model
    weights: Mapping[str, PackedWeight]
    reference: Reference


def _trace(
    checkpoint: CompressedCheckpoint, options: ExportOptions, scratch: Path, device: torch.device, progress: Progress
) -> _Traced:
    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    prompt = tuple(checkpoint.manifest["detection"]["token_ids"])
    with progress.step(f"Loading {checkpoint.name}"):
        model = build_model(checkpoint, torch.float32)
        weights = pack_weights(checkpoint, model, dtype)
        head = model.get_output_embeddings().weight.detach()
        if options.graph == "genai":
            floats = sum(parameter.nbytes for parameter in model.parameters())
            check_space(scratch, floats + floats * dtype.itemsize // 4)  # this copy, and the builder's graph of it
            save_for_builder(model, scratch / "model")
            checkpoint.save_companions(scratch / "model")
        head_name, tied = "lm_head", False
        if options.lm_head_bits:
            compact = any(weight.row_scales is not None for weight in weights.values())
            head_name, weights_of_head, tied = pack_head(model, options.lm_head_bits, dtype, compact=compact)
            weights[head_name] = weights_of_head
        elif (held := packed_head(checkpoint, model, dtype)) is not None:
            head_name, weights_of_head, tied = held
            weights[head_name] = weights_of_head
    place, said = place_for(checkpoint, torch.float32, device)
    with progress.step(f"Asking it what the file will be compared with{said}"):
        model.to(place)  # type: ignore[arg-type]
        with watch_peaks(model, weights) as peaks:
            reference = make_reference(model, prompt)
        reference = dataclasses.replace(reference, long=make_long_reference(model))
        model.to(CPU)  # type: ignore[arg-type]
        if options.accuracy_level:
            weights = at_level_4(weights, peaks, channels_of(checkpoint))
    with progress.step("Tracing the graph"):
        if options.graph == "genai":

            def dense(name: str) -> torch.Tensor:
                return head if name == head_name else model.get_submodule(name).weight.detach()  # type: ignore[operator]

            graph = genai_graph(
                scratch / "model",
                scratch / "graph",
                weights,
                dense,
                head_name,
                checkpoint.name,
                windows_of(checkpoint.config),
                embedding_scale(model, prompt),
                half=dtype is torch.float16,
            )
        else:
            model = model.half() if dtype is torch.float16 else model
            graph = dynamo_graph(model, weights, checkpoint.name, head_name if tied else None)
    return _Traced(graph, weights, reference)


def _config(checkpoint: CompressedCheckpoint, options: ExportOptions) -> dict[str, Any]:
    """The original's configuration: the weights are in the graph, so nothing of how they are quantized is left."""
    left_out = ("quantization_config", "swquant", "torch_dtype")
    config = {key: value for key, value in checkpoint.raw_config.items() if key not in left_out}
    return {**config, "dtype": "float16" if options.precision == "fp16" else "float32"}


def _deltas(graph: onnx_ir.Model) -> dict[str, np.ndarray]:
    """The initializers that hold the outliers of LinearNBits nodes."""
    nodes = [node for node in graph.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    values = [node.inputs[6] for node in nodes if len(node.inputs) > 6]
    return {
        str(value.name): value.const_value.numpy()
        for value in values
        if value is not None and value.const_value is not None
    }


def _weight_record(weight: PackedWeight) -> NodeRecord:
    record: NodeRecord = {
        "shape": [weight.N, weight.K],
        "operator": weight.operator,
        "bits": weight.bits,
        "block": weight.block,
        "offsets": weight.has_offsets,
        "outliers": weight.outliers,
        "channels": 0 if weight.channels is None else weight.channels.numel(),
        "bytes": narrowed(weight).nbytes,
    }
    if blocks := sum(map(len, weight.trained)):
        record["trained_blocks"] = blocks
    return record


def _write_manifest(
    checkpoint: CompressedCheckpoint,
    folder: Path,
    options: ExportOptions,
    traced: _Traced,
    check: CheckRecord,
) -> OnnxManifest:
    (folder / "swquant").mkdir()
    files = file_table(folder)
    return write_manifest(
        folder,
        {
            "kind": "onnx",
            "swquant": __version__,
            "source": {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
            "options": options.as_dict(),
            "compression": {"source": checkpoint.manifest["source"], "options": checkpoint.manifest["options"]},
            "detection": checkpoint.manifest["detection"],
            "check": check,
            "operators": count_operators(traced.graph),
            "weights": {name: _weight_record(weight) for name, weight in traced.weights.items()},
            "totals": {"bytes": sum(record["bytes"] for record in files.values())},
            "tensors": {},
            "files": files,
        },
    )
