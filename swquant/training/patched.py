"""A checkpoint with one more set of blocks: every file as it was, but sidecar, manifest and card, written anew.

The shards, config.json and the tokenizer are byte for byte the old ones, so a loader that knows no sidecar sees the
checkpoint that was trained on, and the older sets lie under the new one as before (`output.rewritten`). Where scales
were trained, too, these alone of all stored tensors are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from calibrationless import Blocks, QuantizedTensor, dequantize
from exporters import layouts
from exporters.errors import SwquantError
from exporters.sidecar import set_problem
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.patch_sets import counted
from swquant.checkpoints.schema import CheckpointManifest, TensorRecord, TuningRecord
from swquant.output.rewritten import Changes, rewrite
from swquant.progress import Progress, silent

__all__ = ["free_name", "write_patched"]


def free_name(manifest: CheckpointManifest | None, wanted: str = "tuned") -> str:
    """A name for a set that no set has yet: `tuned`, `tuned-2`, … manifest: None of a model that has no sets. Raises
    SwquantError for a name that no set can have."""
    if problem := set_problem(wanted):
        raise SwquantError(f"a set of blocks cannot be called so: {problem}")
    taken, number, name = set[str](), 1, wanted
    if manifest is not None:
        taken = {*counted(manifest), *manifest.get("tuned", {})}
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def write_patched(
    checkpoint: CompressedCheckpoint,
    out: Path,
    of_set: str,
    blocks: Mapping[str, Blocks],
    record: TuningRecord,
    *,
    scaled: Mapping[str, QuantizedTensor] = MappingProxyType({}),
    files: Mapping[str, bytes] = MappingProxyType({}),
    overwrite: bool = False,
    progress: Progress = silent,
) -> CheckpointManifest:
    """Write `checkpoint` with a set of blocks (stored name -> blocks, in the order of the tensors) into OUT.

    record: how they were trained, for the manifest. scaled: rounded weights that have other scales now, and the same
    codes. files: name -> content, of other files that change. Returns the manifest. Raises SwquantError; then `out`
    does not exist, or is what it was.
    """
    changes = Changes(
        parts=dict(_scales_of(scaled)),
        patches={of_set: blocks},
        files=files,
        records={name: _seen(checkpoint.manifest["tensors"][name], weight) for name, weight in scaled.items()},
        content={"tuned": {**checkpoint.manifest.get("tuned", {}), of_set: record}},
    )
    return rewrite(checkpoint, out, changes, overwrite=overwrite, progress=progress)


def _scales_of(scaled: Mapping[str, QuantizedTensor]) -> Iterator[tuple[str, Tensor]]:
    """Stored name -> tensor of the scales and offsets, the only floats of a rounded weight."""
    for name, weight in scaled.items():
        for part, tensor in layouts.to_tensors(weight).items():
            if tensor.is_floating_point():
                yield f"{name.removesuffix('.weight')}.{part}", tensor


def _seen(record: TensorRecord, weight: QuantizedTensor) -> dict[str, Any]:
    """What a loader that ignores the sidecar now sees of the super weights."""
    if "dense" in record or "super_weights" not in record:
        return {}
    decoded = dequantize(weight, torch.float32)
    points = ({**item, "without_sidecar": float(decoded[item["row"], item["col"]])} for item in record["super_weights"])
    return {"super_weights": list(points)}
