"""What swquant laid beside a checkpoint's weights, read without swquant and without trust.

`swquant/manifest.json` says which files belong to the checkpoint and which channels W8A8 keeps in float;
`swquant/outliers.safetensors` holds sets of patches (docs/format.md of swquant describes both):

    S/X.rows int32 [n]   S/X.cols int32 [n]   S/X.values [n] or [n, B, B]     the patches of set S for tensor X

Whatever is unknown, damaged or outside the weight is refused in one line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["MANIFEST", "OUTLIERS", "SIDECAR", "Checkpoint", "Patch", "SidecarError", "fetched", "open_checkpoint"]

MANIFEST, SIDECAR = "swquant/manifest.json", "swquant/outliers.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The set of single weights, which lies under all others; those of any other name hold blocks.
OUTLIERS = "outliers"
_POINTS = {"kind": "points", "mode": "replace"}
_BLOCKS = ({"kind": "blocks", "mode": "add"}, {"kind": "blocks", "mode": "replace"})


class SidecarError(RuntimeError):
    """A checkpoint that the plugin cannot serve as it is meant: one line with the remedy."""


@dataclass(frozen=True)
class Patch:
    """n sub-matrices of B x B weights, B = 1 for single ones: rows, cols int64 [n] count whole blocks from the weight's
    [0, 0], values float32 [n, B, B] replace what is there or are added to it. What sticks out of the weight is void."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    adds: bool


@dataclass(frozen=True)
class Checkpoint:
    """Patches and kept channels of a checkpoint. Holds no open file: vLLM hands it from process to process.

    path: the sidecar. sets: name -> adds. patched: tensor -> names of its sets, in their order. channels: tensor ->
    input channels that W8A8 keeps in float.
    """

    path: Path | None
    sets: Mapping[str, bool]
    patched: Mapping[str, tuple[str, ...]]
    channels: Mapping[str, tuple[int, ...]]

    def patches(self, tensor: str, shape: tuple[int, int]) -> list[Patch]:
        """Those of a [out, in] tensor, in the order in which they are laid over it. Raises SidecarError."""
        names = self.patched.get(tensor, ())
        if not names:
            return []
        with _opened(self.path) as file:
            return [_read(file, f"{name}/{tensor}", shape, self.sets[name]) for name in names]

    def kept(self, tensor: str, size: int) -> tuple[int, ...]:
        """The channels of a tensor's inputs that stay in float. Raises SidecarError for one outside."""
        channels = self.channels.get(tensor, ())
        if not all(type(channel) is int and 0 <= channel < size for channel in channels):
            raise SidecarError(
                f"{tensor}: kept channels outside 0 to {size - 1}; {MANIFEST} is damaged, fetch it again"
            )
        return channels


def open_checkpoint(folder: Path) -> Checkpoint:
    """What lies in swquant/ of a checkpoint's folder. Raises SidecarError for what is missing, damaged or too new."""
    sha256, channels = _manifest(folder / MANIFEST)
    if sha256 is None:
        return Checkpoint(None, {}, {}, channels)
    path = folder / SIDECAR
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SidecarError(f"{path}: {error.strerror}; fetch the checkpoint with its folder swquant/") from None
    if digest != sha256:
        raise SidecarError(f"{path}: its bytes are not those that {MANIFEST} names; fetch both again")
    with _opened(path) as file:
        sets, patched = _understood(path, file.metadata() or {}, list(file.keys()))
    return Checkpoint(path, sets, patched, channels)


def fetched(model: str, revision: str | None) -> Path:
    """The folder of a checkpoint that vLLM knows by a path or a hub id, with what the plugin reads of it."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(hf_hub_download(model, MANIFEST, revision=revision)).parent.parent
        if _manifest(folder / MANIFEST)[0] is not None:
            hf_hub_download(model, SIDECAR, revision=revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise SidecarError(f"{model}: {SIDECAR} cannot be fetched: {str(error).partition(chr(10))[0]}") from None
    return folder


def _manifest(path: Path) -> tuple[str | None, dict[str, tuple[int, ...]]]:
    """(sha256 of the sidecar or None, tensor -> its kept channels where stock loaders round inputs)."""
    try:
        manifest = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) != ("swquant-manifest", 1):
            raise SidecarError(f"{path}: not swquant-manifest 1, the version that is known; update swquant-vllm")
        sidecar, rounded = manifest["files"].get(SIDECAR), manifest["activations"] or {"declared": False}
        inputs = {name: record["inputs"] for name, record in manifest["tensors"].items() if "inputs" in record}
        channels = {name: tuple(found["channels"]) for name, found in inputs.items() if rounded["declared"]}
        sha256 = sidecar and sidecar["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SidecarError(
            f"{path}: no manifest of a swquant checkpoint ({type(error).__name__}); fetch it again"
        ) from None
    return sha256, channels


def _opened(path: Path | None) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SidecarError(f"{path}: {error}; fetch it again") from None


def _understood(
    path: Path, metadata: Mapping[str, str], names: list[str]
) -> tuple[dict[str, bool], dict[str, tuple[str, ...]]]:
    """(set -> adds, tensor -> its sets) of a sidecar with these metadata and names."""
    if (metadata.get("format"), metadata.get("version")) != ("swquant-patches", "1"):
        raise SidecarError(f"{path}: not swquant-patches 1, the version that is known; update swquant-vllm")
    try:
        forms = json.loads(metadata["sets"])
        known = all(form == _POINTS if name == OUTLIERS else form in _BLOCKS for name, form in forms.items())
    except (ValueError, KeyError, AttributeError, RecursionError):
        known = False
    if not known:
        raise SidecarError(f"{path}: unknown sets of patches {metadata.get('sets', '')[:100]!r}; update swquant-vllm")
    parts: dict[str, dict[str, set[str]]] = {}
    for name in names:
        patched, _, part = name.rpartition(".")
        of_set, _, tensor = patched.partition("/")
        parts.setdefault(tensor, {}).setdefault(of_set, set()).add(part)
    for tensor, found in parts.items():
        whole = all(of_set in forms and held == {"rows", "cols", "values"} for of_set, held in found.items())
        if not (whole and tensor.isprintable()):  # names are shown in messages of one line
            raise SidecarError(
                f"{path}: {tensor[:80]!r} has parts that no set has; fetch it again, or update swquant-vllm"
            )
    patched_by = {tensor: tuple(name for name in forms if name in found) for tensor, found in parts.items()}
    return {name: form["mode"] == "add" for name, form in forms.items()}, patched_by


def _read(file: Any, name: str, shape: tuple[int, int], adds: bool) -> Patch:
    try:
        rows, cols, values = (file.get_tensor(f"{name}.{part}") for part in ("rows", "cols", "values"))
    except SafetensorError as error:
        raise SidecarError(f"{name}: {error}; the sidecar is damaged") from None
    count, side = rows.numel(), 1 if name.startswith(f"{OUTLIERS}/") else values.shape[-1] if values.ndim else 0
    limits = [-(-size // max(side, 1)) for size in shape]
    fits = (
        rows.dtype == cols.dtype == torch.int32
        and values.dtype in _FLOATS
        and rows.shape == cols.shape == (count,)
        and values.shape == ((count,) if name.startswith(f"{OUTLIERS}/") else (count, side, side))
        and side > 0
        and all(bool(((index >= 0) & (index < limit)).all()) for index, limit in zip((rows, cols), limits, strict=True))
        and torch.unique(rows.long() * limits[1] + cols).numel() == count
        and bool(values.isfinite().all())
    )
    if not fits:
        raise SidecarError(
            f"{name}: its patches do not fit a weight of {list(shape)}; the sidecar is damaged or another's"
        )
    return Patch(rows.long(), cols.long(), values.float().reshape(count, side, side), adds)
