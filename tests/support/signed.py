"""Manifests that agree with files that a test has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from exporters.json_file import json_bytes
from swquant.checkpoints.manifest import MANIFEST

__all__ = ["sign"]


def sign(folder: Path, change: dict | None = None) -> None:
    """Make the manifest agree with the files again: what remains is what only a look inside can find."""
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_text()), "digest": "", **(change or {})}
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest, sort_keys=True)
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_bytes(json_bytes(manifest))
