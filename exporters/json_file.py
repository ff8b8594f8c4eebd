"""JSON objects in files: read with a message that names the file, written so that equal content gives equal bytes."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.errors import CheckpointError

__all__ = ["json_bytes", "parse_json", "read_json", "read_json_value", "write_json"]

_LARGEST = 1 << 28  # bytes; a manifest of 100,000 tensors has a quarter of them


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are text, each there once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    "".join(value).encode()  # raises UnicodeError, a ValueError, for half of a surrogate pair
    return value


def parse_json(data: bytes, *, unique: bool = False) -> Any:
    """JSON in UTF-8. Raises ValueError for anything else: Python by itself also reads UTF-16 and a byte order mark,
    which other readers of the same file do not. unique: also for a key that is there twice."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_value(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError if it is none."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe waits for ever, a device never ends
            raise CheckpointError(f"{path}: not a file; put the file itself there, or fetch it again")
        if status.st_size > _LARGEST:
            raise CheckpointError(
                f"{path}: {status.st_size:,} bytes are more than {_LARGEST:,}; the file is damaged, fetch it again"
            )
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or fetch it again"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); the file is damaged, fetch or save it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is none."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; the file is damaged, fetch or save it again")
    return value


def json_bytes(content: Mapping[str, Any], *, constants: bool = False) -> bytes:
    """A JSON object as `write_json` writes it."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=constants) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any], *, constants: bool = False) -> None:
    """Write a JSON object. Raises ValueError for NaN and Infinity, which are not JSON.

    constants: write them all the same. Configurations of models hold them (Mamba-2: a time step up to Infinity), and
    what reads such a file reads them.
    """
    path.write_bytes(json_bytes(content, constants=constants))
