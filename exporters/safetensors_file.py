"""safetensors files: read tensor by tensor without trusting the header, write without holding tensors.

The format is 8 bytes with the length of a JSON header, the header (`{name: {dtype, shape,
data_offsets}}`), then the bytes of all tensors, end to end. Two properties of this module are why it exists
beside the safetensors package, whose files it reads and writes:

- Reading copies one tensor with plain reads instead of mapping the file. A mapped file counts as
  resident memory until the kernel takes it back, and a file that shrinks under a map kills the process;
  a short read is an error message. (The package can do that, too, but more slowly: docs/decisions.md.)
- Writing streams. Sizes are known before the first byte (a plan has been made), so the header goes
  first and tensors follow one at a time, hashed as they pass. What a killed process left of a file can be
  taken up again, tensor by tensor, as far as the hashes of its bytes are those that it was known to have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from exporters.errors import CheckpointError
from exporters.json_file import parse_json

__all__ = ["Begun", "Entry", "FileRecord", "SafetensorsReader", "SafetensorsWriter", "dtype_name"]

# The safetensors package refuses longer headers too; a model of 100,000 tensors needs 12 MB.
_MAX_HEADER = 100_000_000
_PIECE = 1 << 22

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype (`BF16`). Raises CheckpointError for one that has none."""
    if dtype not in _NAMES:
        raise CheckpointError(f"{dtype} cannot be stored in safetensors; use one of: {', '.join(_DTYPES)}")
    return _NAMES[dtype]


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor. start, end: bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its size, its sha256 and that of every tensor in it."""

    nbytes: int
    sha256: str
    tensors: Mapping[str, str]


def _check(condition: bool, path: Path, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"{path}: {problem}; the file is damaged or not safetensors, fetch or save it again")


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(path: Path, name: str, raw: Any, data_start: int, size: int) -> Entry:
    _check(
        isinstance(raw, dict) and {"dtype", "shape", "data_offsets"} <= raw.keys(),
        path,
        f"no dtype, shape and offsets for {name}",
    )
    if not isinstance(raw["dtype"], str) or raw["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has the unknown dtype {raw['dtype']!r}; known are {', '.join(_DTYPES)}; "
            "load the model in transformers and save it again in bfloat16"
        )
    shape, offsets = raw["shape"], raw["data_offsets"]
    _check(
        isinstance(shape, list) and all(map(_natural, shape)) and math.prod(max(1, size) for size in shape) < 2**63,
        path,
        f"{name} has the shape {shape}",
    )
    _check(
        isinstance(offsets, list) and len(offsets) == 2 and all(map(_natural, offsets)),
        path,
        f"{name} has the offsets {offsets}",
    )
    entry = Entry(_DTYPES[raw["dtype"]], tuple(shape), data_start + offsets[0], data_start + offsets[1])
    _check(
        entry.start <= entry.end <= size,
        path,
        f"{name} lies at bytes {entry.start} to {entry.end} of a file of {size} (truncated?)",
    )
    _check(
        entry.nbytes == entry.end - entry.start,
        path,
        f"{name} of shape {shape} and dtype {raw['dtype']} needs {entry.nbytes} bytes, its offsets span {entry.end - entry.start}",
    )
    return entry


class SafetensorsReader:
    """Lazy reader of one file. Opening parses and checks the header; `read` copies one tensor."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error.strerror})") from None
        try:
            self.entries, self.metadata, self.header_sha256 = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str], str]:
        size = os.fstat(self._file.fileno()).st_size
        _check(size >= 8, self.path, f"{size} bytes are too few for a header")
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        _check(length <= min(size - 8, _MAX_HEADER), self.path, f"the header claims {length} bytes in a file of {size}")
        text = self._file.read(length)
        try:
            header = parse_json(text, unique=True)
        except ValueError:
            header = None
        _check(isinstance(header, dict), self.path, "the header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        _check(
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
            self.path,
            "the metadata is not a JSON object of strings",
        )
        entries = {name: _parse_entry(self.path, name, raw, 8 + length, size) for name, raw in header.items()}
        position = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            _check(
                entry.start == position,
                self.path,
                f"{name} begins at byte {entry.start}, the one before it ends at {position}",
            )
            position = entry.end
        _check(position == size, self.path, f"{size - position} bytes follow the last tensor")
        return entries, metadata, hashlib.sha256(prefix + text).hexdigest()

    def read_bytes(self, name: str) -> Tensor:
        """The raw bytes of a tensor, uint8 [nbytes]."""
        entry = self.entries[name]
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._file.seek(entry.start)
        view, done = memoryview(buffer.numpy().data), 0
        while done < entry.nbytes:
            try:
                count = self._file.readinto(view[done:])
            except OSError as error:
                raise CheckpointError(f"{self.path}: {name} cannot be read ({error.strerror})") from None
            _check(count > 0, self.path, f"{name} ends after {done} of {entry.nbytes} bytes")
            done += count
        return buffer

    def read(self, name: str) -> Tensor:
        """A tensor of its own memory, with the dtype and shape of its entry."""
        entry = self.entries[name]
        return self.read_bytes(name).view(entry.dtype).reshape(entry.shape)

    def sha256(self) -> str:
        """Hexadecimal sha256 of the whole file."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Begun:
    """A part of a file that is there already: where it ends, the running sha256 up to there, and the tensors that
    were found in it last, with theirs."""

    nbytes: int
    hash: Any  # hashlib has no name for its type
    tensors: Mapping[str, str]


def _begins_with(path: Path, head: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(head)) == head
    except OSError:
        return False


class SafetensorsWriter:
    """Streaming writer of one file, whose tensors are announced first and then written in any grouping
    but in that order.

    layout: (name, dtype, shape) in the order in which `write` will be called. begun: an earlier process may have left a
    part of this file; what `holds` finds in it is passed over by `go_on`, and the first `write` cuts off what follows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        begun: bool = False,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        self._expected: list[tuple[str, Entry]] = []
        for name, dtype, shape in layout:
            entry = Entry(dtype, tuple(shape))
            header[name] = {
                "dtype": dtype_name(dtype),
                "shape": list(shape),
                "data_offsets": [position, position + entry.nbytes],
            }
            position += entry.nbytes
            self._expected.append((name, entry))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors then begin on a multiple of 8
        head = len(text).to_bytes(8, "little") + text
        self.path = Path(path)
        self._hash = hashlib.sha256()
        self._nbytes = 0
        self._done: dict[str, str] = {}
        self._begun = begun and _begins_with(self.path, head)
        self._file = open(self.path, "r+b" if self._begun else "wb")  # noqa: SIM115 - closed by finish() or close()
        if self._begun:
            self.go_on(Begun(len(head), hashlib.sha256(head), {}))
        else:
            self._emit(head)

    def holds(self, tensors: Mapping[str, str]) -> Begun | None:
        """What lies in the file where the next announced tensors belong, if these are their names and sha256. None
        where it is anything else. Nothing is passed over yet."""
        expected = self._expected[len(self._done) :][: len(tensors)]
        if not self._begun or [name for name, _ in expected] != list(tensors):
            return None
        nbytes, whole = self._nbytes, self._hash.copy()
        for name, entry in expected:
            own, end = hashlib.sha256(), nbytes + entry.nbytes
            while nbytes < end:
                try:
                    piece = os.pread(self._file.fileno(), min(_PIECE, end - nbytes), nbytes)
                except OSError:  # a bad sector: it is written again
                    return None
                if not piece:
                    return None
                own.update(piece)
                whole.update(piece)
                nbytes += len(piece)
            if own.hexdigest() != tensors[name]:
                return None
        return Begun(nbytes, whole, tensors)

    def go_on(self, begun: Begun) -> None:
        """Pass over what `holds` found."""
        self._nbytes, self._hash = begun.nbytes, begun.hash
        self._done |= begun.tensors
        self._file.seek(self._nbytes)

    def flush(self) -> None:
        """Everything written so far is on the disk when this returns. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _emit(self, data: bytes | memoryview) -> None:
        self._cut()
        self._file.write(data)
        self._hash.update(data)
        self._nbytes += len(data)

    def _cut(self) -> None:
        """What another process left behind this place is of no use."""
        if self._begun:
            self._file.truncate()
            self._begun = False

    def write(self, name: str, tensor: Tensor) -> str:
        """Append the next announced tensor. Returns its sha256. Raises ValueError if it is another, or of another
        form."""
        if len(self._done) == len(self._expected):
            raise ValueError(f"{self.path}: {name} was not announced")
        expected, entry = self._expected[len(self._done)]
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, entry.dtype, entry.shape):
            raise ValueError(
                f"{expected} {entry.dtype} {list(entry.shape)} was announced, got {name} {tensor.dtype} {list(tensor.shape)}"
            )
        data = (
            memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            if entry.nbytes
            else memoryview(b"")
        )
        self._emit(data)
        self._done[name] = hashlib.sha256(data).hexdigest()
        return self._done[name]

    def finish(self) -> FileRecord:
        """Flush to disk and close. Raises ValueError if announced tensors are missing."""
        if len(self._done) != len(self._expected):
            raise ValueError(f"{self.path}: {len(self._expected) - len(self._done)} announced tensors were not written")
        self._cut()
        self.flush()
        self._file.close()
        return FileRecord(self._nbytes, self._hash.hexdigest(), self._done)

    def close(self) -> None:
        """Close without finishing (after an error)."""
        self._file.close()
