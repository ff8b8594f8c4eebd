"""The manifest, `swquant/manifest.json`: what a compressed checkpoint is, how it was made, and a hash of every byte.

It is written last, so a folder without one is unfinished. `digest` is the sha256 of the manifest itself with
that field empty. Nothing in it depends on the machine, the time or the number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import SwquantError
from exporters.json_file import read_json, write_json

if TYPE_CHECKING:
    from swquant.detection import Found
    from swquant.plan import Plan, TensorPlan

__all__ = [
    "MANIFEST",
    "detection_record",
    "loader_table",
    "outlier_counts",
    "read_manifest",
    "tensor_record",
    "write_manifest",
]

MANIFEST = "swquant/manifest.json"
_FORMAT, _VERSION = "swquant-manifest", 1


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({**manifest, "digest": ""}, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write `content` with format, version and digest. Returns what was written."""
    manifest = {"format": _FORMAT, "version": _VERSION, "digest": "", **content}
    manifest["digest"] = _digest(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a compressed checkpoint. Raises SwquantError where it is missing, altered or from the future."""
    path = folder / MANIFEST
    if not path.is_file():
        raise SwquantError(f"{folder}: no {MANIFEST}; not a checkpoint made by swquant, or an unfinished one")
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise SwquantError(
            f"{path}: format {manifest.get('format')} version {manifest.get('version')} is not {_FORMAT} {_VERSION}; update swquant"
        )
    if manifest.get("digest") != _digest(manifest):
        raise SwquantError(
            f"{path}: the digest does not match its content; the manifest was changed after it was written"
        )
    return manifest


def outlier_counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Tensor -> number of its weights in the sidecar, for those that have any."""
    return {name: record["outliers"] for name, record in manifest["tensors"].items() if record.get("outliers")}


def detection_record(found: Found) -> dict[str, Any]:
    """What was detected, as JSON: the same for `detect --json` and the manifest."""
    detection = found.detection

    return {
        "prompt": found.prompt,
        "token_ids": list(found.token_ids),
        "tokens": list(found.tokens),
        "rounds": detection.rounds,
        "super_weights": [_rounded(asdict(item)) for item in detection.super_weights],
        "cancellers": [_rounded(asdict(item)) for item in detection.cancellers],
        "super_activations": [_rounded(asdict(item)) for item in detection.super_activations],
        "layers": [_rounded(asdict(item)) for item in detection.layers],
        "published": [
            {"model": entry.model, "coordinates": [list(point) for point in entry.coordinates]}
            for entry in found.published
        ],
    }


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: more would be noise of float32."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def loader_table(plan: Plan) -> dict[str, str]:
    """Loader -> what it does with the result, in one sentence each."""
    schemes = {plan.scheme(tensor) for tensor in plan.quantized}
    odd = sorted({scheme.bits for scheme in schemes} - {4, 8}, reverse=True)
    groups = sorted({scheme.group_size for scheme in schemes if scheme.group_size} - {32, 64, 128})
    if plan.int8_inputs:
        vllm = "yes, with integer products; ignores the sidecar and the channels kept in float"
    elif odd:
        vllm = f"no: its kernels take 4 and 8 bits, not {odd[0]}"
    elif groups:
        vllm = f"no: its kernels take groups of 32, 64, 128 or a channel, not {groups[0]}"
    elif any(".experts." in tensor.name for tensor in plan.quantized):
        vllm = "yes, as mixture of experts; ignores the sidecar"
    else:
        vllm = "yes; ignores the sidecar"
    if not plan.options.symmetric:
        # 0.18 to 0.20 allocate the zero point unpacked and stop with a size mismatch; earlier ones pack odd bits otherwise.
        versions = "0.15 to 0.17 (0.18 to 0.20 stop at packed zero points)"
    else:
        versions = "0.18 or later" if odd and odd[0] != 2 else "0.15 or later"
    ours = "yes; restores every outlier" if plan.options.restore else "yes; nothing to restore"
    stock = f"yes, with compressed-tensors {versions}; ignores the sidecar"
    if plan.int8_inputs:
        ours, stock = f"{ours}, rounds activations", f"{stock}, rounds activations, all channels of them"
    elif plan.options.activations == "int8":
        ours, stock = f"{ours}, rounds activations", f"{stock}, leaves activations in float"
        vllm = f"{vllm}, leaves activations in float" if vllm.startswith("yes") else vllm
    return {"swquant.load": ours, "transformers": stock, "vLLM": vllm}


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
