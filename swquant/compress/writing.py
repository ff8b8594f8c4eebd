"""The writer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibrationless import (
    Outliers,
    dequantize,
    feed_back,
    measure,
)
from exporters import compressed_tensors
from exporters.json_file import write_json
from exporters.safetensors_file import FileRecord, SafetensorsWriter
from exporters.sidecar import SIDECAR, SidecarWriter
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.manifest import write_manifest
from swquant.compress.loaders import loader_table
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.records import activations_record, input_record, tensor_record
from swquant.compress.report import REPORT, checkpoint_report
from swquant.compress.tensor import cast, check_finite, choose_outliers, coordinates, round_weight
from swquant.detect.folds import fold_columns, fold_gain
from swquant.detect.found import Found
from swquant.detect.own_text import SelfText, self_text
from swquant.detect.record import detection_record
from swquant.output.verification import file_table
from swquant.progress import Progress
from swquant.version import __version__

__all__ = ["Prepared", "write_all"]

# The layout written here is the one that this version of compressed-tensors reads and writes.
_FORMAT_VERSION = "0.20.0"


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is written."""

    checkpoint: Checkpoint
    found: Found
    plan: Plan
    low_memory: bool = False


def write_all(prepared: Prepared, folder: Path, progress: Progress) -> Mapping[str, Any]:
    """Everything that belongs into OUT. Returns the manifest."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    (folder / "swquant").mkdir()
    records, written = _write_weights(prepared, folder, progress)
    checkpoint.save_companions(folder)
    write_json(folder / "config.json", _config(checkpoint, plan))
    page = checkpoint_report(checkpoint.name, prepared.found, plan, records)
    (folder / REPORT).write_text(page, encoding="utf-8")
    files = file_table(folder, written)
    return write_manifest(
        folder,
        {
            "swquant": __version__,
            "source": {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
            "options": plan.options.as_dict(),
            "fingerprint": plan.options.fingerprint(checkpoint.fingerprint),
            "detection": detection_record(prepared.found),
            "activations": activations_record(plan.options, declared=plan.int8_inputs),
            "loaders": loader_table(plan),
            "totals": {
                "bits_per_quantized_weight": round(plan.bits_per_weight, 4),
                "quantized_weights": sum(tensor.source.numel for tensor in plan.quantized),
                "weights": sum(tensor.source.numel for tensor in plan.tensors),
                "bytes": sum(record["bytes"] for record in files.values()),
                "source_bytes": plan.source_bytes,
            },
            "notes": list(plan.notes),
            "left_out": dict(plan.left_out),
            "tensors": records,
            "files": files,
        },
    )


def _write_weights(
    prepared: Prepared, folder: Path, progress: Progress
) -> tuple[dict[str, dict[str, Any]], dict[str, FileRecord]]:
    """The shards, their index and the sidecar. Returns the tensors' records and the files'."""
    plan = prepared.plan
    files: dict[str, FileRecord] = {}
    records: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    patched = [(tensor.name, tensor.points, tensor.source.dtype) for tensor in plan.tensors if tensor.points]
    with ExitStack() as stack:
        text = stack.enter_context(_text_of(prepared, progress))
        sidecar = SidecarWriter(folder / SIDECAR, patched) if patched else None
        if sidecar is not None:
            stack.callback(sidecar.close)
        bar = stack.enter_context(progress.bytes("Compressing", plan.source_bytes))
        for index, shard in enumerate(plan.shards, start=1):
            name = f"model-{index:05d}-of-{len(plan.shards):05d}.safetensors"
            layout = [(key, *form) for tensor in shard for key, form in tensor.layout.items()]
            writer = SafetensorsWriter(folder / name, layout, {"format": "pt"})
            stack.callback(writer.close)
            errors = {tensor.name: _write_tensor(tensor, prepared, writer, sidecar, text, bar) for tensor in shard}
            files[name] = writer.finish()
            for tensor in shard:
                records[tensor.name] = tensor_record(tensor, plan, name, files[name].tensors) | errors[tensor.name]
                weight_map |= dict.fromkeys(tensor.layout, name)
        if sidecar is not None:
            files[SIDECAR] = sidecar.finish()
    total = sum(tensor.nbytes for tensor in plan.tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return records, files


def _text_of(prepared: Prepared, progress: Progress) -> AbstractContextManager[SelfText | None]:
    """The model with text of its own, where the refinement needs it."""
    options = prepared.plan.options
    if options.refinement != "self":
        return nullcontext()
    names = [tensor.name for tensor in prepared.plan.quantized]
    return self_text(
        prepared.checkpoint,
        prepared.found,
        names,
        texts=options.texts,
        low_memory=prepared.low_memory,
        seed=options.seed,
        progress=progress,
    )


def _write_tensor(
    tensor: TensorPlan,
    prepared: Prepared,
    writer: SafetensorsWriter,
    sidecar: SidecarWriter | None,
    text: SelfText | None,
    bar: Any,
) -> dict[str, Any]:
    """Read, round, pack and write one tensor. Returns what its rounding cost (nothing for a dense one)."""
    weight = prepared.checkpoint.read(tensor.name)
    bar.advance(tensor.name, tensor.source.nbytes)
    fold = tensor.fold
    if tensor.block is None:
        ((name, (dtype, _)),) = tensor.layout.items()
        check_finite(tensor.name, weight)
        if fold is not None:
            weight = fold_gain(weight, fold, is_bias=tensor.name == fold.bias)
        writer.write(name, cast(tensor.name, weight, dtype))
        return {"scaled": True} if fold else {}
    energy = prepared.found.energy(tensor.name)
    if fold is not None:
        weight = fold_columns(weight, fold)
        energy = torch.ldexp(energy, -2 * fold.exponents.to(torch.int32)) if energy is not None else None
    options = prepared.plan.options
    importance = energy if options.refinement != "none" else None
    own = text.statistics(tensor.name, fold.exponents if fold else None) if text is not None else None
    if own is not None:
        energy = importance = own[1]
    quantized = round_weight(weight, tensor, options, importance)
    kept = choose_outliers(weight, quantized, tensor, importance) if tensor.points else None
    if own is not None:
        # Without a sidecar, too, a super weight keeps its own code: its extreme is all that represents it.
        held = kept if kept is not None or not tensor.super_weights else Outliers.at(weight, *coordinates(tensor))
        quantized = feed_back(weight, quantized, own[0], held)
    for key, part in compressed_tensors.to_tensors(quantized, int8_inputs=prepared.plan.int8_inputs).items():
        writer.write(f"{tensor.module}.{key}", part)
    if kept is not None and sidecar is not None:
        sidecar.write(tensor.name, kept)
    error = measure(weight, quantized, kept, energy)
    record: dict[str, Any] = {
        "relative_error": float(f"{error.relative:.7g}"),
        "largest_error": float(f"{error.largest:.7g}"),
    }
    if error.output is not None:
        record["output_error"] = float(f"{error.output:.7g}")
    if fold is not None:
        record["scaled"] = True
    if (inputs := input_record(tensor, prepared.found, options)) is not None:
        record["inputs"] = inputs
    if tensor.super_weights:
        # What a loader sees that does not know the sidecar: the safety rule, in numbers.
        decoded = dequantize(quantized, torch.float32)
        record["super_weights"] = [
            {"row": row, "col": col, "value": float(weight[row, col]), "without_sidecar": float(decoded[row, col])}
            for row, col in tensor.super_weights
        ]
    return record


def _config(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    schemes = {tensor.module: plan.scheme(tensor) for tensor in plan.quantized}
    dense = [
        tensor.module
        for tensor in plan.tensors
        if tensor.block is None
        and tensor.name.endswith(".weight")
        and len(tensor.source.shape) == 2
        and tensor.reason != "embedding"
    ]
    if "lm_head" not in dense:
        dense.append("lm_head")
    config = dict(checkpoint.raw_config)
    if plan.options.parsed_dtype is not None:
        config["dtype"] = plan.options.dtype
        config.pop("torch_dtype", None)
    config["quantization_config"] = compressed_tensors.quantization_config(schemes, dense, _FORMAT_VERSION)
    config["swquant"] = {"version": __version__, "manifest": "swquant/manifest.json", "sidecar": SIDECAR}
    return config
