"""JSON objects in files: read with a message that names the file, written so that equal content gives equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.errors import CheckpointError

__all__ = ["json_bytes", "read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); the file is damaged, fetch or save it again") from None
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
