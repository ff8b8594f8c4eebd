"""A GGUF file, written tensor by tensor: the header first, from what is planned, then each tensor as it is made.

The gguf package lays out header and keys; nothing but the tensor at hand is in memory. What was written is read again
and compared by hash, since the file is all there is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from exporters.errors import SwquantError
from exporters.gguf.blocks import TYPES

__all__ = ["MADE_BY", "Form", "copy_keys", "floats", "is_ours", "write_file"]

MADE_BY = "swquant.version"  # a key that llama.cpp skips
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Form:
    """A tensor that is to be written. type: of GGUF. shape: [..., in] of the weights."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        if self.type in TYPES:
            return rows * TYPES[self.type].row_bytes(self.shape[-1])
        return rows * self.shape[-1] * (4 if self.type == "F32" else 2)


def floats(dtype: torch.dtype) -> str | None:
    """The type that holds floats as they are, None where there is none."""
    return _FLOATS.get(dtype)


def write_file(
    path: Path, arch: str, forms: Iterable[Form], keys: Callable[[gguf.GGUFWriter], None], data: Iterable[Tensor]
) -> str:
    """Write a file: header and keys, then the data of the forms in their order, each a tensor of its bytes.

    Returns the sha256 of all data. Raises SwquantError where what is on the disk is something else."""
    writer = gguf.GGUFWriter(None, arch)
    keys(writer)
    planned, digests = tuple(forms), []
    for form in planned:
        kind = gguf.GGMLQuantizationType[form.type]
        writer.add_tensor_info(form.name, form.shape, np.dtype(np.float32), form.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for form, tensor in zip(planned, data, strict=True):
            content = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
            if content.nbytes != form.nbytes:
                raise AssertionError(f"{form.name}: {content.nbytes} bytes were made, {form.nbytes} planned")
            digests.append(hashlib.sha256(content.data).digest())
            writer.write_tensor_data(content)
    finally:
        writer.close()
    _check(path, planned, digests)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _check(path: Path, forms: tuple[Form, ...], digests: list[bytes]) -> None:
    """Read the file again, as anybody's reader does."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for form, digest in zip(forms, digests, strict=True):
        tensor = stored.get(form.name)
        shape = None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))
        if tensor is None or shape != form.shape or tensor.tensor_type.name != form.type:
            raise SwquantError(f"{path.name}: {form.name} was not written as planned; is the disk sound?")
        if hashlib.sha256(np.ascontiguousarray(tensor.data).view(np.uint8).data).digest() != digest:
            raise SwquantError(f"{path.name}: {form.name} is not what was written; is the disk sound?")


def copy_keys(writer: gguf.GGUFWriter, fields: Mapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Copy what stands under these prefixes in another file's header, with its types."""
    for name, field in fields.items():
        if name.startswith(prefixes):
            sub = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)


def is_ours(path: Path) -> bool:
    """Whether a file is a GGUF file that swquant wrote."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                return False
        return MADE_BY in gguf.GGUFReader(path).fields
    except Exception:  # the package raises nearly everything for a damaged header
        return False
