"""`export`, from end to end: a compressed checkpoint becomes an ONNX folder.

    open -> torch model and its answers -> pack -> graph -> write -> run and compare -> manifest -> rename

As with `compress`, everything happens in a hidden folder beside OUT, which appears under its name when it is complete and
gives the same answers as the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

import swquant
from exporters.json_file import write_json
from exporters.onnx.nodes import DOMAIN, OPERATOR, PackedWeight
from exporters.onnx.write import add_function, count_operators, save
from swquant.checkpoint.compressed import CompressedCheckpoint
from swquant.console import Progress, silent
from swquant.destination import check_destination, check_space, replace, unfinished
from swquant.manifest import write_manifest
from swquant.models import build_model
from swquant.onnx_check import check_export, make_reference
from swquant.onnx_graph import dynamo_graph, put_packed_linears
from swquant.onnx_linears import PackedModel, pack_model
from swquant.onnx_options import ExportOptions
from swquant.verification import file_sha256

__all__ = ["Exported", "export_checkpoint"]


@dataclass(frozen=True)
class Exported:
    """A finished ONNX folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]


def export_checkpoint(
    checkpoint: CompressedCheckpoint,
    out: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Export a checkpoint that was opened with unrounded=True. `out` appears whole or not at all. Raises SwquantError."""
    check_destination(out, overwrite, checkpoint)
    with progress.step(f"Loading {checkpoint.name}"):
        model = build_model(checkpoint, torch.float32)
        packed = pack_model(checkpoint, model, torch.float32)
        reference = make_reference(model, tuple(checkpoint.manifest["detection"]["token_ids"]))
    with progress.step("Tracing the graph"):
        put_packed_linears(model, packed.weights, options.accuracy_level)
        graph = dynamo_graph(model, checkpoint.name)
        if packed.form is not None:
            add_function(graph, packed.form)
    check_space(out, 2 * sum(parameter.numel() * 4 for parameter in model.state_dict().values()))
    with unfinished(out) as folder:
        with progress.step("Writing"):
            save(graph, folder)
            checkpoint.save_companions(folder)
            write_json(folder / "config.json", _config(checkpoint))
        with progress.step("Running it beside the checkpoint"):
            deltas = _deltas(graph)
            check = check_export(folder, deltas, checkpoint.config, reference, options)
        manifest = _write_manifest(checkpoint, folder, options, packed, graph, check)
        replace(folder, out, overwrite)
    return Exported(out, manifest)


def _config(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    """The original's configuration: the weights are in the graph, so nothing of how they are quantized is left in it."""
    left_out = ("quantization_config", "swquant", "torch_dtype")
    config = {key: value for key, value in checkpoint.raw_config.items() if key not in left_out}
    return {**config, "dtype": "float32"}


def _deltas(graph: onnx_ir.Model) -> dict[str, np.ndarray]:
    """The initializers that hold the outliers of LinearNBits nodes."""
    values = [node.inputs[6] for node in graph.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    return {
        str(value.name): value.const_value.numpy()
        for value in values
        if value is not None and value.const_value is not None
    }


def _weight_record(weight: PackedWeight) -> dict[str, Any]:
    return {
        "shape": [weight.N, weight.K],
        "operator": weight.operator,
        "bits": weight.bits,
        "block": weight.block,
        "outliers": weight.outliers,
        "bytes": weight.nbytes,
    }


def _write_manifest(
    checkpoint: CompressedCheckpoint,
    folder: Path,
    options: ExportOptions,
    packed: PackedModel,
    graph: onnx_ir.Model,
    check: Mapping[str, Any],
) -> dict[str, Any]:
    (folder / "swquant").mkdir()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
    return write_manifest(
        folder,
        {
            "kind": "onnx",
            "swquant": swquant.__version__,
            "source": {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
            "options": options.as_dict(),
            "detection": checkpoint.manifest["detection"],
            "check": dict(check),
            "operators": count_operators(graph),
            "weights": {name: _weight_record(weight) for name, weight in packed.weights.items()},
            "totals": {"bytes": sum(record["bytes"] for record in files.values())},
            "tensors": {},
            "files": files,
        },
    )
