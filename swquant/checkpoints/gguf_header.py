"""The header of a GGUF file, read once, out of one memory map that transformers is handed, too.

A vocabulary is most of a header: some hundred thousand strings, each with its length. The gguf package makes two numpy
arrays of every one, and so does transformers, which walks through the file once for the configuration and twice for the
tokenizer. Here a string is a slice of the map's bytes, and transformers' own functions are given what was read already.
"""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from transformers import modeling_gguf_pytorch_utils as theirs
from transformers.integrations.gguf import reader as tokenizer_reader

from swquant.checkpoints.gguf_blocks import PLAIN, decode_plain

__all__ = ["Header", "config_by_transformers", "decoded", "shared"]

_LOCK = threading.RLock()  # transformers' functions are replaced for a moment

# The package decodes 16 rows at a time; of short rows that is more overhead than work. Weights in a row of ours.
_ROW = 1 << 12


class Header(gguf.GGUFReader):
    """The package's reader. Little-endian files only. Raises what the package, struct and numpy raise if it lies."""

    _plain: np.ndarray | None = None

    @property
    def mapped(self) -> np.ndarray:
        """uint8 [bytes of the file]."""
        if self._plain is None:
            self._plain = np.asarray(self.data)  # the same bytes; slices of a numpy.memmap cost ten times as much
        return self._plain

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        count = int(count)
        end = offset + np.dtype(dtype).itemsize * count
        return self.mapped[offset:end].view(dtype)[:count]

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """As the package's. Elements of an array: of numbers arrays of one, of strings bytes without their length."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        start = orig_offs + 12
        item, count = struct.unpack_from("<IQ", self.mapped.data, orig_offs)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        if item == GGUFValueType.STRING:
            size, parts = _strings(self.mapped, start, count)
        elif (number := self.gguf_scalar_to_np.get(item)) is not None:
            size = np.dtype(number).itemsize * count
            if start + size > len(self.data):
                raise ValueError(f"{count} numbers, more than there are bytes behind them")
            parts = list(self._get(start, number, count).reshape(-1, 1))
        else:  # an array of arrays
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([GGUFValueType(item)] if count else [])]
        return 12 + size, [*head, *parts], list(range(2, 2 + count)), types


def _strings(data: np.ndarray, start: int, count: int) -> tuple[int, list[np.ndarray]]:
    """(bytes that they take, `count` strings, each behind its length). data: uint8. Slices of a memoryview would be
    objects for the garbage collector to walk over: four times the time."""
    view, parts, at, end = data.data, [], start, len(data)
    for _ in range(count):  # whatever a file claims, the end of the map comes first
        (length,) = struct.unpack_from("<Q", view, at)
        at += 8 + length
        if at > end:
            raise ValueError(f"a string of {length} bytes, more than there are behind it")
        parts.append(data[at - length : at])
    return at - start, parts


def decoded(tensor: gguf.ReaderTensor) -> np.ndarray:
    """The values of an encoded tensor, float32 unless it stores other numbers, shaped as in the file; for tensors that
    store numbers a view of the map. Raises what the package raises for an encoding that it does not know."""
    data = np.asarray(tensor.data)
    if data.dtype != np.uint8 or data.ndim != 2:
        return gguf.dequantize(data, tensor.tensor_type)
    if tensor.tensor_type.name in PLAIN:
        return decode_plain(data, tensor.tensor_type.name)
    rows, width = data.shape
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    weights = width // block_bytes * per_block
    # Blocks lie end to end and do not reach over rows, so that a few rows may be called one.
    together = math.gcd(rows, 1 << max(_ROW // max(weights, 1), 1).bit_length())
    return gguf.dequantize(data.reshape(rows // together, -1), tensor.tensor_type).reshape(rows, -1)


def config_by_transformers(path: Path, header: Header) -> dict[str, Any]:
    """The configuration that transformers makes of the header, by its own table of names."""
    one_by_one = vars(theirs)["_gguf_parse_value"]

    def value(part: Any, types: Any) -> Any:
        if len(types) != 2:  # not an element of an array
            return one_by_one(part, types)
        return str(part, "utf-8") if types[1] is GGUFValueType.STRING else part.item()

    with _replaced(gguf, "GGUFReader", lambda *_: header), _replaced(theirs, "_gguf_parse_value", value):
        config: dict[str, Any] = theirs.load_gguf_checkpoint(str(path))["config"]
    return config


@contextmanager
def shared(path: Path, data: memoryview, config: dict[str, Any]) -> Iterator[None]:
    """While it is open, transformers is given `config` and the file's bytes where it would read this file again."""
    load_original, map_original, file = theirs.load_gguf_checkpoint, tokenizer_reader._mapped, path.resolve()

    def load(asked: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(asked).resolve() != file or options.get("return_tensors"):
            return load_original(asked, *arguments, **options)
        return {"config": {key: list(value) if isinstance(value, list) else value for key, value in config.items()}}

    def mapped(asked: str) -> Any:
        return data if Path(asked).resolve() == file else map_original(asked)

    with _replaced(theirs, "load_gguf_checkpoint", load), _replaced(tokenizer_reader, "_mapped", mapped):
        yield


@contextmanager
def _replaced(module: Any, name: str, new: Any) -> Iterator[None]:
    with _LOCK:
        original = getattr(module, name)
        setattr(module, name, new)
        try:
            yield
        finally:
            setattr(module, name, original)
