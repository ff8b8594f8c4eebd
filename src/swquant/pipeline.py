"""`compress`, from end to end: the only module that knows the order of things.

    open -> probe and detect -> plan -> per tensor: read, round, pack, write -> sidecar, config, report, manifest -> verify -> rename

Everything is written into a hidden folder beside OUT, verified there, and renamed as the last act. Whatever
happens before that, OUT does not exist (or, with overwrite, is still the old one).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import swquant
from calibrationless import (
    Outliers,
    QuantizedTensor,
    block_elements,
    block_index,
    dequantize,
    feed_back,
    for_pieces,
    measure,
    quantize,
    worst,
)
from exporters import compressed_tensors
from exporters.errors import SwquantError
from exporters.json_file import write_json
from exporters.safetensors_file import FileRecord, SafetensorsWriter
from exporters.sidecar import SIDECAR, SidecarWriter
from swquant.activations import activations_record, input_record
from swquant.budget import bits_within
from swquant.checkpoint.base import Checkpoint
from swquant.console import Progress, silent
from swquant.destination import check_destination, check_space, no_space, replace, unfinished
from swquant.detection import Found, find_super_weights
from swquant.folding import fold_columns, fold_gain
from swquant.manifest import detection_record, loader_table, tensor_record, write_manifest
from swquant.options import CompressOptions
from swquant.plan import Plan, TensorPlan, make_plan
from swquant.report import REPORT, checkpoint_report
from swquant.self_text import SelfText, self_text
from swquant.verification import file_table, verify

__all__ = ["Compressed", "Prepared", "compress_checkpoint", "prepare", "write"]

# The layout written here is the one that this version of compressed-tensors reads and writes.
_FORMAT_VERSION = "0.20.0"


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is written."""

    checkpoint: Checkpoint
    found: Found
    plan: Plan
    low_memory: bool = False


@dataclass(frozen=True)
class Compressed:
    """A finished checkpoint and its manifest."""

    path: Path
    manifest: Mapping[str, Any]


def prepare(
    checkpoint: Checkpoint, options: CompressOptions, *, low_memory: bool = False, progress: Progress = silent
) -> Prepared:
    """Probe and plan; writes nothing."""
    if checkpoint.kind == "swquant":
        raise SwquantError(f"{checkpoint.name}: already compressed; start from the original model")
    with progress.step(f"Probing {checkpoint.name} with one prompt"):
        found = find_super_weights(
            checkpoint, options.prompt, low_memory=low_memory, folds=options.refinement != "none"
        )

    def plan_with(bits: Mapping[str, int]) -> Plan:
        return make_plan(checkpoint, found.architecture, found.detection.super_weights, options, found.folds, bits)

    bits: Mapping[str, int] = {}
    if options.bits_budget is not None:
        bits = bits_within(checkpoint, found, options, plan_with, low_memory=low_memory, progress=progress)
    plan = plan_with(bits)
    return Prepared(checkpoint, found, plan, low_memory)


def compress_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: CompressOptions,
    *,
    overwrite: bool = False,
    low_memory: bool = False,
    progress: Progress = silent,
) -> Compressed:
    """Probe, plan and write. Raises SwquantError for everything the user can mend."""
    check_destination(out, overwrite, checkpoint)
    return write(
        prepare(checkpoint, options, low_memory=low_memory, progress=progress),
        out,
        overwrite=overwrite,
        progress=progress,
    )


def write(prepared: Prepared, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> Compressed:
    """Carry out a plan. `out` appears whole or not at all."""
    check_destination(out, overwrite, prepared.checkpoint)
    check_space(out, prepared.plan.nbytes)
    try:
        with unfinished(out) as folder:
            manifest = _write_all(prepared, folder, progress)
            with progress.step("Verifying every byte"):
                problems = verify(folder)
            if problems:
                raise SwquantError(f"{out}: the result does not verify ({problems[0]}); is the disk sound?")
            replace(folder, out, overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(out, prepared.plan.nbytes) from None
        raise SwquantError(f"{error.filename or out}: cannot be written ({error.strerror}); give another OUT") from None
    return Compressed(out, manifest)


def _write_all(prepared: Prepared, folder: Path, progress: Progress) -> Mapping[str, Any]:
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
            "swquant": swquant.__version__,
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
        _check_finite(tensor.name, weight)
        if fold is not None:
            weight = fold_gain(weight, fold, is_bias=tensor.name == fold.bias)
        writer.write(name, _cast(tensor.name, weight, dtype))
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
        held = kept if kept is not None or not tensor.super_weights else Outliers.at(weight, *_coordinates(tensor))
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


def _all_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point():
        return True
    values = weight.flatten()

    def finite(piece: slice) -> bool:  # of a whole embedding, the temporaries would take five times its bytes
        return bool(torch.isfinite(values[piece].to(torch.float32)).all())

    return all(for_pieces(finite, values.numel(), 1))


def _check_finite(name: str, weight: torch.Tensor) -> None:
    if not _all_finite(weight):
        raise SwquantError(f"{name}: holds a NaN or infinite value; the source is damaged, fetch it again")


def _cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense tensor as it is stored."""
    cast = weight.to(dtype)
    if dtype is not weight.dtype and not _all_finite(cast):
        kind = str(dtype).removeprefix("torch.")
        raise SwquantError(f"{name}: a value of {weight.abs().max():.3g} does not fit {kind}; use --dtype bfloat16")
    return cast


def round_weight(
    weight: torch.Tensor, tensor: TensorPlan, options: CompressOptions, importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """Round one weight as planned; blocks that hold a super weight keep their extreme."""
    assert tensor.block is not None
    scale_dtype = tensor.layout[f"{tensor.module}.weight_scale"][0]
    keep_extreme = None
    if tensor.super_weights:
        rows, cols = _coordinates(tensor)
        count = tensor.source.numel // block_elements(tensor.block, tensor.shape)
        keep_extreme = torch.zeros(count, dtype=torch.bool)
        keep_extreme[block_index(rows, cols, tensor.block, tensor.shape)] = True
    try:
        return quantize(
            weight,
            tensor.block,
            tensor.bits,
            symmetric=options.symmetric,
            clip=options.parsed_clip,
            importance=importance,
            keep_extreme=keep_extreme,
            scale_dtype=scale_dtype,
        )
    except ValueError as error:
        _check_finite(tensor.name, weight)
        raise SwquantError(f"{tensor.name}: {error}; use --dtype bfloat16") from None


def choose_outliers(
    weight: torch.Tensor, quantized: QuantizedTensor, tensor: TensorPlan, importance: torch.Tensor | None = None
) -> Outliers:
    """The points of a tensor's sidecar: its super weights, and as many of the worst rounded as were planned."""
    return worst(weight, quantized, tensor.points, always=tensor.super_weights, importance=importance)


def _coordinates(tensor: TensorPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of a tensor's super weights."""
    rows, cols = torch.tensor(tensor.super_weights, dtype=torch.int64).T
    return rows, cols


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
    config["swquant"] = {"version": swquant.__version__, "manifest": "swquant/manifest.json", "sidecar": SIDECAR}
    return config
