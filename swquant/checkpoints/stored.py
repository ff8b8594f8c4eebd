"""What stands in the files for one tensor of a compressed checkpoint, and whether that can be believed.

A hash proves that a file is the one that the manifest lists, not that either makes sense. `check_stored` looks at what
a loader relies on: the parts that belong to a tensor, their dtypes and shapes, that every scale and every weight is a
finite number, and the hash of every part: whoever loads a checkpoint gets what was written, or a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from calibrationless import dequantize
from exporters import layouts
from exporters.errors import CheckpointError
from exporters.safetensors_file import SafetensorsReader
from exporters.text import shown
from swquant.checkpoints.schema import UNUSED, TensorRecord

__all__ = ["all_finite", "check_decoded", "check_dense", "check_hashes", "check_stored"]


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
        raise CheckpointError(
            f"{shown(name)} has the shape {list(tensor.shape)}, the manifest says {record['shape']}; fetch or write it again"
        )
    if record.get("dense") != UNUSED and not all_finite(tensor):
        raise CheckpointError(f"{shown(name)} holds a NaN or infinite value; fetch or write it again")


def check_hashes(name: str, record: TensorRecord, parts: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless stored name -> tensor are byte for byte those of the record."""
    for stored, tensor in parts.items():
        data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data) if tensor.numel() else b""
        if hashlib.sha256(data).hexdigest() != record["sha256"][stored]:
            raise CheckpointError(
                f"{shown(stored)} is not what was written for {shown(name)}, its sha256 says; fetch or write it again"
            )


def check_decoded(name: str, weight: torch.Tensor) -> None:
    """Raise CheckpointError where codes and scales, finite by themselves, stand for a weight that is not."""
    if not all_finite(weight):
        raise CheckpointError(
            f"{shown(name)} is damaged (its scales are so large that a weight is infinite); fetch or write it again"
        )


def check_stored(name: str, record: TensorRecord, reader: SafetensorsReader) -> None:
    """Raise CheckpointError unless the parts of a tensor are those of its record, and can be decoded. The file must
    hold them all."""
    if "dense" in record:
        if list(record["sha256"]) != [name]:
            raise CheckpointError(f"{shown(name)} is said to be made of {shown(list(record['sha256']))}")
        dense = reader.read(name)
        check_dense(name, record, dense)
        check_hashes(name, record, {name: dense})
        return
    module = name.removesuffix(".weight")
    tensors = {stored: reader.read(stored) for stored in record["sha256"]}
    parts = {stored.removeprefix(f"{module}."): tensor for stored, tensor in tensors.items()}
    try:
        layouts.check_tensors(parts, record["bits"], record["shape"])
    except ValueError as error:
        raise CheckpointError(f"{shown(name)} is damaged ({error}); fetch or write it again") from None
    check_hashes(name, record, tensors)
    floats = [part for part in parts.values() if part.is_floating_point()]
    largest = sum(float(part.abs().max()) for part in floats) * (1 << record["bits"])
    if largest > torch.finfo(floats[0].dtype).max:  # otherwise no weight can be infinite
        check_decoded(name, dequantize(layouts.from_tensors(parts, record["bits"], record["shape"])))
