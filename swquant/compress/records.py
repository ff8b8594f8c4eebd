"""What the manifest says of tensors: how they are stored, what rounding cost, which inputs are kept in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch

from calibrationless import massive_channels, static_scale
from swquant.checkpoints.schema import ActivationsRecord, InputsRecord, TensorRecord
from swquant.compress.options import CompressOptions
from swquant.compress.plan import Plan, TensorPlan
from swquant.compress.tensor import RoundedTensor
from swquant.detect.found import Found
from swquant.models.architecture import LinearKind
from swquant.units import short

__all__ = ["activations_record", "input_record", "measured_record", "tensor_record"]


def tensor_record(
    tensor: TensorPlan, plan: Plan, shard: str, hashes: Mapping[str, str], measured: Mapping[str, Any]
) -> TensorRecord:
    """What the manifest says of one tensor. shard: the file that holds it. measured: from `measured_record`."""
    record: dict[str, Any] = {
        "shape": list(tensor.source.shape),
        "source_dtype": str(tensor.source.dtype).removeprefix("torch."),
        "file": shard,
        "bytes": tensor.nbytes,
        "sha256": {name: hashes[name] for name in tensor.layout},
    }
    if tensor.block is None:
        return cast(TensorRecord, {**record, "dense": tensor.reason, **measured})
    scheme = plan.scheme(tensor)
    rounded = {
        **record,
        "bits": scheme.bits,
        "block": str(tensor.block),
        "symmetric": scheme.symmetric,
        "stored_as": str(scheme),
        "outliers": tensor.outliers,
        **{patch.set: patch.count for patch in tensor.patches},
        **measured,
    }
    return cast(TensorRecord, rounded)


def measured_record(
    tensor: TensorPlan, rounded: RoundedTensor, found: Found, options: CompressOptions
) -> dict[str, Any]:
    """What is known only after a tensor was rounded: its errors, and what became of its super weights and inputs."""
    record: dict[str, Any] = {}
    if rounded.error is not None:
        record = {"relative_error": short(rounded.error.relative), "largest_error": short(rounded.error.largest)}
        if rounded.error.output is not None:
            record["output_error"] = short(rounded.error.output)
    if tensor.fold is not None:
        record["scaled"] = True
    if rounded.error is not None and (inputs := input_record(tensor, found, options)) is not None:
        record["inputs"] = inputs
    if rounded.super_weights:
        record["super_weights"] = [asdict(item) for item in rounded.super_weights]
    return record


def activations_record(options: CompressOptions, *, declared: bool) -> ActivationsRecord | None:
    """The manifest's `activations`, None where they stay in float. declared: whether stock loaders are told, too."""
    if options.activations == "none":
        return None
    return {
        "dtype": "int8",
        "scale": "per-token" if options.per_token else "per-tensor",
        "range": "static" if options.static else "dynamic",
        "declared": declared,
    }


def input_record(tensor: TensorPlan, found: Found, options: CompressOptions) -> InputsRecord | None:
    """What the manifest says of a tensor's inputs: `channels` that are kept in float, and why. None where inputs stay
    in float.

    With --no-restore no channel is kept.
    """
    seen = found.record(tensor.name)
    if (
        options.activations == "none"
        or tensor.table
        or found.architecture.weights[tensor.name].kind is not LinearKind.LINEAR
        or seen is None
    ):
        return None
    peaks = seen.peaks
    if tensor.fold is not None:  # the norm holds less of what its columns now hold more of
        peaks = torch.ldexp(peaks, -tensor.fold.exponents.to(torch.int32))
    channels = massive_channels(peaks) if options.restore else torch.empty(0, dtype=torch.int32)
    record: InputsRecord = {
        "channels": channels.tolist(),
        "peaks": [short(value) for value in peaks[channels.to(torch.int64)].tolist()],
        "median": short(float(peaks.median())),
        "norm": seen.norm or None,
    }
    if options.static:
        record["scale"] = short(static_scale(peaks, channels))
    return record
