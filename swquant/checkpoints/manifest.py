"""The manifest, `swquant/manifest.json`: what a compressed checkpoint is, how it was made, and a hash of every byte.

It is written last, so a folder without one is unfinished. `digest` is the sha256 of the manifest itself with
that field empty. Nothing in it depends on the machine, the time or the number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.errors import SwquantError
from exporters.json_file import read_json, write_json

__all__ = ["MANIFEST", "outlier_counts", "read_manifest", "write_manifest"]

MANIFEST = "swquant/manifest.json"


_FORMAT, _VERSION = "swquant-manifest", 1


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({**manifest, "digest": ""}, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write `content` with format, version and digest. Returns what was written."""
    manifest = {"format": _FORMAT, "version": _VERSION, "digest": "", **content}
    manifest["digest"] = _digest(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a compressed checkpoint. Raises SwquantError where it is missing, altered or from the future."""
    path = folder / MANIFEST
    if not path.is_file():
        raise SwquantError(f"{folder}: no {MANIFEST}; not a checkpoint made by swquant, or an unfinished one")
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise SwquantError(
            f"{path}: format {manifest.get('format')} version {manifest.get('version')} is not {_FORMAT} {_VERSION}; update swquant"
        )
    if manifest.get("digest") != _digest(manifest):
        raise SwquantError(
            f"{path}: the digest does not match its content; the manifest was changed after it was written"
        )
    return manifest


def outlier_counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Tensor -> number of its weights in the sidecar, for those that have any."""
    return {name: record["outliers"] for name, record in manifest["tensors"].items() if record.get("outliers")}
