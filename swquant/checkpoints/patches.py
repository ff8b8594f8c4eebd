"""What stands in `swquant/patches.json`, in a folder of patches alone: in the place of the manifest that a model has.

Here, not in `patched`: who only asks whose a folder is does not wait for transformers.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, final

from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

from exporters.errors import SwquantError
from exporters.json_file import read_json
from swquant.checkpoints.schema import SourceRecord, TuningRecord

__all__ = ["PATCHES", "PatchedTensor", "PatchesManifest", "is_patches", "read_patches"]

PATCHES = "swquant/patches.json"


class PatchedTensor(TypedDict):
    """A tensor of the base: what it must be, and how many blocks of which set lie over it."""

    shape: list[int]
    sha256: str
    blocks: dict[str, int]


@final
class PatchesManifest(TypedDict):
    """What stands in `patches.json`. sidecar: sha256 of the file of blocks."""

    format: Literal["swquant-patches-of-a-model"]
    version: Literal[1]
    swquant: str
    base: SourceRecord
    sidecar: str
    tensors: dict[str, PatchedTensor]
    tuned: dict[str, TuningRecord]


def is_patches(path: Path) -> bool:
    """Whether a folder holds patches alone."""
    return os.path.isfile(path / PATCHES)  # unlike Path.is_file, no error for a name that is too long


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter  # here, not above: most commands read no such file

    return TypeAdapter(PatchesManifest)


def read_patches(folder: Path) -> PatchesManifest:
    """What `patches.json` says. Raises SwquantError where it is missing, or holds anything but that."""
    from pydantic import ValidationError

    content = read_json(folder / PATCHES)
    try:
        _validator().validate_python(content, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SwquantError(
            f"{folder / PATCHES}: {where[:100]}: {first['msg'].lower()}; fetch it again, or update swquant"
        ) from None
    return cast(PatchesManifest, content)
