"""What the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from calibrationless import massive_channels, static_scale

if TYPE_CHECKING:
    from swquant.compress.plan import Plan, TensorPlan
    from swquant.detect.found import Found
if TYPE_CHECKING:
    from swquant.compress.options import CompressOptions
    from swquant.compress.plan import TensorPlan
    from swquant.detect.found import Found

__all__ = ["activations_record", "input_record", "tensor_record"]


def tensor_record(tensor: TensorPlan, plan: Plan, shard: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the manifest says of one tensor; the pipeline adds the errors of quantized ones."""
    record: dict[str, Any] = {
        "shape": list(tensor.source.shape),
        "source_dtype": str(tensor.source.dtype).removeprefix("torch."),
        "file": shard,
        "bytes": tensor.nbytes,
        "sha256": {name: hashes[name] for name in tensor.layout},
    }
    if tensor.block is None:
        return {**record, "dense": tensor.reason}
    scheme = plan.scheme(tensor)
    return {
        **record,
        "bits": scheme.bits,
        "block": str(tensor.block),
        "symmetric": scheme.symmetric,
        "stored_as": str(scheme),
        "outliers": tensor.points,
    }


def activations_record(options: CompressOptions, *, declared: bool) -> dict[str, Any] | None:
    """The manifest's `activations`, None where they stay in float. declared: whether stock loaders are told, too."""
    if options.activations == "none":
        return None
    return {
        "dtype": options.activations,
        "scale": "per-token" if options.per_token else "per-tensor",
        "range": "static" if options.static else "dynamic",
        "declared": declared,
    }


def input_record(tensor: TensorPlan, found: Found, options: CompressOptions) -> dict[str, Any] | None:
    """What the manifest says of a tensor's inputs: `channels` that are kept in float, and why. None where inputs stay in float.

    With --no-restore no channel is kept.
    """
    seen = found.record(tensor.name)
    if options.activations == "none" or found.architecture.weights[tensor.name].kind != "linear" or seen is None:
        return None
    peaks = seen.peaks
    if tensor.fold is not None:  # the norm holds less of what its columns now hold more of
        peaks = torch.ldexp(peaks, -tensor.fold.exponents.to(torch.int32))
    channels = massive_channels(peaks) if options.restore else torch.empty(0, dtype=torch.int32)
    record: dict[str, Any] = {
        "channels": channels.tolist(),
        "peaks": [_short(value) for value in peaks[channels.to(torch.int64)].tolist()],
        "median": _short(float(peaks.median())),
        "norm": seen.norm or None,
    }
    if options.static:
        record["scale"] = _short(static_scale(peaks, channels))
    return record


def _short(value: float) -> float:
    return float(f"{value:.7g}")
