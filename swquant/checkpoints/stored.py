"""What stands in the files for one tensor of a compressed checkpoint, and whether that can be believed.

A hash proves that a file is the one that the manifest lists, not that either makes sense. `check_stored` looks at what
a loader relies on: the parts that belong to a tensor, their dtypes and shapes, and that every scale and every weight
that is not rounded is a finite number. Codes and zero points need no look: every bit pattern is one.
"""

from __future__ import annotations

import torch

from exporters import compressed_tensors
from exporters.errors import CheckpointError
from exporters.safetensors_file import SafetensorsReader
from exporters.text import shown
from swquant.checkpoints.schema import UNUSED, TensorRecord

__all__ = ["all_finite", "check_dense", "check_stored"]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite. Extremes keep both, and take no memory to find."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def check_dense(name: str, record: TensorRecord, tensor: torch.Tensor) -> None:
    """Raise CheckpointError unless a tensor that is not rounded has the shape of its record and is finite, or of no
    use to any loader."""
    if list(tensor.shape) != record["shape"]:
        raise CheckpointError(f"{shown(name)} has the shape {list(tensor.shape)}, the manifest says {record['shape']}")
    if record.get("dense") != UNUSED and not all_finite(tensor):
        raise CheckpointError(f"{shown(name)} holds a NaN or infinite value; fetch or write it again")


def check_stored(name: str, record: TensorRecord, reader: SafetensorsReader) -> None:
    """Raise CheckpointError unless the parts of a tensor are those of its record, and can be decoded. The file must
    hold them all."""
    if "dense" in record:
        if list(record["sha256"]) != [name]:
            raise CheckpointError(f"{shown(name)} is said to be made of {shown(list(record['sha256']))}")
        check_dense(name, record, reader.read(name))
        return
    module = name.removesuffix(".weight")
    parts = {}
    for stored in record["sha256"]:
        local, entry = stored.removeprefix(f"{module}."), reader.entries[stored]
        looked_at = local in ("weight_scale", "weight_shape")  # of the others, dtype and shape are enough
        parts[local] = reader.read(stored) if looked_at else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    try:
        compressed_tensors.check_tensors(parts, record["bits"], record["shape"])
    except ValueError as error:
        raise CheckpointError(f"{shown(name)} is damaged ({error}); fetch or write it again") from None
