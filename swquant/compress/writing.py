"""The writer: takes rounded tensors in the order of the plan, and writes shards, sidecar and all other files.

It is the only one that writes, so the bytes cannot depend on where the tensors were rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from exporters.json_file import write_json
from exporters.safetensors_file import FileRecord, SafetensorsWriter
from exporters.sidecar import SIDECAR, SidecarWriter
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.manifest import write_manifest
from swquant.checkpoints.schema import CheckpointManifest, TensorRecord
from swquant.compress.config import checkpoint_config
from swquant.compress.evidence import evidence_for, text_of
from swquant.compress.loaders import loader_table
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.records import activations_record, measured_record, tensor_record
from swquant.compress.report import REPORT, checkpoint_report
from swquant.compress.tensor import RoundedTensor, round_tensor
from swquant.detect.found import Found
from swquant.detect.own_text import SelfText
from swquant.detect.record import detection_record
from swquant.output.verification import file_table
from swquant.progress import Bar, Progress
from swquant.version import __version__

__all__ = ["Prepared", "write_all"]


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is written."""

    checkpoint: Checkpoint
    found: Found
    plan: Plan
    low_memory: bool = False


def write_all(prepared: Prepared, folder: Path, progress: Progress) -> CheckpointManifest:
    """Everything that belongs into OUT. Returns the manifest."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    (folder / "swquant").mkdir()
    records, written = _write_weights(prepared, folder, progress)
    checkpoint.save_companions(folder)
    write_json(folder / "config.json", checkpoint_config(checkpoint, plan, prepared.found.architecture), constants=True)
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


def _rounded(prepared: Prepared, bar: Bar, text: SelfText | None) -> Iterator[tuple[TensorPlan, RoundedTensor]]:
    """Every tensor in the order of the plan, one in memory at a time."""
    found, refinement = prepared.found, prepared.plan.options.refinement
    for tensor in prepared.plan.tensors:
        bar.advance(tensor.name, tensor.source.nbytes)
        # No name for the weight: it would live on beside the next one.
        yield (
            tensor,
            round_tensor(tensor, prepared.checkpoint.read(tensor.name), evidence_for(tensor, found, refinement, text)),
        )


def _write_weights(
    prepared: Prepared, folder: Path, progress: Progress
) -> tuple[dict[str, TensorRecord], dict[str, FileRecord]]:
    """The shards, their index and the sidecar, the only files that weights are written to. Returns the tensors' records
    and the files'."""
    plan, found = prepared.plan, prepared.found
    files: dict[str, FileRecord] = {}
    records: dict[str, TensorRecord] = {}
    weight_map: dict[str, str] = {}
    patched = [patch for tensor in plan.tensors for patch in tensor.patches]
    with ExitStack() as stack:
        text = stack.enter_context(
            text_of(prepared.checkpoint, found, plan, low_memory=prepared.low_memory, progress=progress)
        )
        sidecar = SidecarWriter(folder / SIDECAR, patched) if patched else None
        if sidecar is not None:
            stack.callback(sidecar.close)
        tensors = _rounded(prepared, stack.enter_context(progress.bytes("Compressing", plan.source_bytes)), text)
        for index, shard in enumerate(plan.shards, start=1):
            name = f"model-{index:05d}-of-{len(plan.shards):05d}.safetensors"
            layout = [(key, *form) for tensor in shard for key, form in tensor.layout.items()]
            writer = SafetensorsWriter(folder / name, layout, {"format": "pt"})
            stack.callback(writer.close)
            measured: dict[str, dict[str, Any]] = {}
            for tensor, rounded in islice(tensors, len(shard)):
                for key, part in rounded.parts.items():
                    writer.write(key, part)
                for of_set, patch in rounded.patches.items():
                    assert sidecar is not None
                    sidecar.write(of_set, tensor.name, patch)
                measured[tensor.name] = measured_record(tensor, rounded, found, plan.options)
                del rounded  # before the next one is made
            files[name] = writer.finish()
            for tensor in shard:
                records[tensor.name] = tensor_record(tensor, plan, name, files[name].tensors, measured[tensor.name])
                weight_map |= dict.fromkeys(tensor.layout, name)
        if sidecar is not None:
            files[SIDECAR] = sidecar.finish()
    total = sum(tensor.nbytes for tensor in plan.tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return records, files
