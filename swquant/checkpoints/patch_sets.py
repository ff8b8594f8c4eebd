"""Which patches lie on a compressed checkpoint: the sets that its manifest counts, held against what its sidecar holds.

A tensor's record counts its `outliers` (`"outliers": 41`), and the blocks of every other set (`"blocks": {"tuned":
3}`). The sidecar must hold exactly those: a model without some of its patches is another model. Sets are laid over a
weight in the sidecar's order.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from exporters.errors import SwquantError
from exporters.sidecar import SETS, SIDECAR, SidecarReader
from swquant.checkpoints.manifest import is_patches
from swquant.checkpoints.schema import Manifest

__all__ = ["counted", "open_patches", "uncounted"]


def counted(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Set -> tensor -> number of its places in the sidecar, for sets and tensors that have any."""
    counts: dict[str, dict[str, int]] = {}
    for name, record in manifest["tensors"].items():
        fixed = {of_set: cast(int, record.get(of_set, 0)) for of_set in SETS}
        for of_set, count in {**fixed, **record.get("blocks", {})}.items():
            if count:
                counts.setdefault(of_set, {})[name] = count
    return counts


def uncounted(sidecar: SidecarReader, manifest: Manifest) -> str | None:
    """The first set of which manifest and sidecar say different things, None where they agree."""
    expected = counted(manifest)
    sets = dict.fromkeys((*expected, *sidecar.counts))
    return next((name for name in sets if expected.get(name, {}) != sidecar.counts.get(name, {})), None)


def open_patches(folder: Path, manifest: Manifest, name: str) -> SidecarReader | None:
    """The sidecar of a checkpoint, None where it has no patches. Raises SwquantError unless it holds exactly those that
    were written. name: of the checkpoint, for messages."""
    if not counted(manifest):
        return None
    remedy = "fetch it again" + ("" if is_patches(manifest) else ", or load without it (--no-restore)")
    if not (folder / SIDECAR).is_file() or SIDECAR not in manifest["files"]:
        raise SwquantError(f"{name}: {SIDECAR} is missing; {remedy}")
    sidecar = SidecarReader(folder / SIDECAR)
    odd = uncounted(sidecar, manifest)
    if odd is None and sidecar.sha256() == manifest["files"][SIDECAR]["sha256"]:
        return sidecar
    sidecar.close()
    what = (
        "is not what was written, its sha256 says"
        if odd is None
        else f"does not hold the {odd} that the manifest counts"
    )
    raise SwquantError(f"{name}: {SIDECAR} {what}; {remedy}")
