"""The manifest, `swquant/manifest.json`: what a compressed checkpoint is, how it was made, and a hash of every byte.

What is exported into a folder has one, too, and so have patches alone: of a `kind` of its own. A checkpoint's has none.

It is written last, so a folder without one is unfinished. `digest` is the sha256 of the manifest itself with
that field empty. Nothing in it depends on the machine, the time or the number of threads.

What is read is checked against the types in `schema`, key by key: a file is not trusted to hold what we once wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast, overload

from typing_extensions import TypeIs

from exporters.errors import CheckpointError, SwquantError
from exporters.json_file import read_json, write_json
from exporters.text import shown
from swquant.checkpoints.schema import (
    FORMAT,
    VERSION,
    CheckpointContent,
    CheckpointManifest,
    DenseRecord,
    Manifest,
    MlxContent,
    MlxManifest,
    OnnxContent,
    OnnxManifest,
    OptionsRecord,
    PatchesContent,
    PatchesManifest,
    RoundedRecord,
    TensorRecord,
)

__all__ = [
    "MANIFEST",
    "content_of",
    "holds_patches",
    "is_checkpoint",
    "is_onnx",
    "is_patches",
    "made_with",
    "read_manifest",
    "rounded",
    "stored_as",
    "write_manifest",
]

MANIFEST = "swquant/manifest.json"
_CHECKPOINT = "checkpoint"  # the kind that is not written
_TYPES: dict[str, type] = {
    _CHECKPOINT: CheckpointManifest,
    "onnx": OnnxManifest,
    "mlx": MlxManifest,
    "patches": PatchesManifest,
}
_TENSORS = [[kind.__name__] for kind in (DenseRecord, RoundedRecord)]
_LONGEST = 100  # characters of a file's text in a message


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({**manifest, "digest": ""}, sort_keys=True, allow_nan=False).encode()).hexdigest()


@overload
def write_manifest(folder: Path, content: CheckpointContent) -> CheckpointManifest: ...
@overload
def write_manifest(folder: Path, content: OnnxContent) -> OnnxManifest: ...
@overload
def write_manifest(folder: Path, content: MlxContent) -> MlxManifest: ...
@overload
def write_manifest(folder: Path, content: PatchesContent) -> PatchesManifest: ...
def write_manifest(folder: Path, content: CheckpointContent | OnnxContent | MlxContent | PatchesContent) -> Manifest:
    """Write `content` with format, version and digest. Returns what was written."""
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "digest": "", **content}
    manifest["digest"] = _digest(manifest)
    write_json(folder / MANIFEST, manifest)
    return cast(Manifest, manifest)


def content_of(manifest: CheckpointManifest) -> dict[str, Any]:
    """What `write_manifest` was given, to be changed and written again."""
    return {key: value for key, value in manifest.items() if key not in ("format", "version", "digest")}


def is_checkpoint(manifest: Manifest) -> TypeIs[CheckpointManifest]:
    """Whether a manifest is a compressed checkpoint's, not that of something exported."""
    return "kind" not in manifest


def is_onnx(manifest: Manifest) -> TypeIs[OnnxManifest]:
    """Whether a manifest is that of an ONNX folder."""
    return manifest.get("kind") == "onnx"


def is_patches(manifest: Manifest) -> TypeIs[PatchesManifest]:
    """Whether a manifest is that of patches alone."""
    return manifest.get("kind") == "patches"


def holds_patches(folder: Path) -> bool:
    """Whether a folder holds patches alone. Raises SwquantError for a manifest that cannot be relied on."""
    if not os.path.isfile(folder / MANIFEST):  # unlike Path.is_file, no error for a name that is too long
        return False
    return not os.path.isfile(folder / "config.json") and is_patches(read_manifest(folder))


def made_with(manifest: Manifest) -> OptionsRecord | None:
    """The options of `compress`: the checkpoint's own, or those of the one that was exported; None of patches alone."""
    if is_patches(manifest):
        return None
    return manifest["options"] if is_checkpoint(manifest) else manifest["compression"]["options"]


def rounded(tensors: Mapping[str, TensorRecord]) -> dict[str, RoundedRecord]:
    """The records of the tensors that are stored as codes."""
    return {name: record for name, record in tensors.items() if "dense" not in record}


def stored_as(record: TensorRecord) -> str:
    """The scheme of a tensor that is stored as codes, otherwise `dense: ` and why."""
    return f"dense: {record['dense']}" if "dense" in record else record["stored_as"]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, or of a folder that was exported. Raises SwquantError where it is missing, altered,
    from the future, or holds anything but what `schema` says."""
    path = folder / MANIFEST
    if not path.is_file():
        raise SwquantError(f"{folder}: no {MANIFEST}; not a checkpoint made by swquant, or an unfinished one")
    manifest = read_json(path)
    form, version = manifest.get("format"), manifest.get("version")
    if form != FORMAT or version != VERSION:
        raise SwquantError(
            f"{path}: format {_shown(form)} version {_shown(version)} is not {FORMAT} {VERSION}; update swquant"
        )
    if manifest.get("digest") != _digest_of_file(path, manifest):
        raise SwquantError(
            f"{path}: the digest does not match its content; the manifest was changed after it was written"
        )
    _check_types(path, manifest)
    return cast(Manifest, manifest)


def _digest_of_file(path: Path, manifest: Mapping[str, Any]) -> str:
    try:
        return _digest(manifest)
    except (ValueError, RecursionError) as error:  # NaN, which Python reads though it is not JSON
        raise CheckpointError(f"{path}: not JSON ({error}); the file is damaged, fetch or save it again") from None


@cache
def _validator(kind: type) -> Any:
    from pydantic import TypeAdapter  # here, not above: most commands read no manifest

    return TypeAdapter(kind)


def _check_types(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise SwquantError for the first key that is missing, unknown or of another type than `schema` says."""
    from pydantic import ValidationError

    kind = manifest.get("kind", _CHECKPOINT)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise SwquantError(
            f"{path}: kind {_shown(kind)} is none that this version knows; update swquant, or fetch it again"
        )
    try:
        _validator(_TYPES[kind]).validate_python(manifest, strict=True, extra="forbid")
    except ValidationError as error:
        problem = next(_problems(error.errors(include_url=False, include_context=False), manifest))
        raise SwquantError(f"{path}: {problem}, or fetch it again") from None


def _problems(errors: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]) -> Iterator[str]:
    """One sentence per error that pydantic has with a manifest, and what the user can do."""
    for error in errors:
        key = list(error["loc"])
        if key[:1] == ["tensors"] and key[2:3] in _TENSORS:  # one of the two types of a tensor: both were tried
            record = manifest["tensors"][key[1]]
            kind = DenseRecord if isinstance(record, dict) and "dense" in record else RoundedRecord
            if key.pop(2) != kind.__name__:
                continue
        where = _shown(".".join(map(str, key)))
        match error["type"]:
            case "missing":
                yield f"{where} is missing; write the folder again"
            case "extra_forbidden":
                yield f"{where} is not a key that this version knows; update swquant"
            case _:
                expected = error["msg"].removeprefix("Input should be ")
                yield f"{where} should be {expected}, not {_shown(json.dumps(error['input']))}; write the folder again"


def _shown(value: object) -> str:
    """A file's text in a message that has a remedy to say, too."""
    return shown(value, _LONGEST)
