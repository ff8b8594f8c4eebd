"""From what a user types to a model: `open_model` opens whatever can be run, `open_checkpoint` what has tensors.

a folder with swquant/manifest.json   CompressedCheckpoint; OnnxFolder where it has model.onnx, too; PatchedCheckpoint
                                      of patches alone, over the model that is named as their base
a folder with config.json             SafetensorsCheckpoint
a file that ends in .gguf             GgufCheckpoint
OWNER/NAME                            fetched from the hub (safetensors only), then one of these folders
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from exporters.errors import SwquantError, first_line
from exporters.onnx.files import MODEL
from exporters.text import shown
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.companions import CODE, COMPANIONS, NEVER
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.gguf import GgufCheckpoint
from swquant.checkpoints.manifest import MANIFEST, holds_patches, read_manifest
from swquant.checkpoints.onnx import OnnxFolder
from swquant.checkpoints.origin import CARD
from swquant.checkpoints.patched import PatchedCheckpoint
from swquant.checkpoints.safetensors import SafetensorsCheckpoint

__all__ = ["is_onnx_folder", "open_checkpoint", "open_model"]


def is_onnx_folder(path: Path) -> bool:
    """Whether `path` is a folder that `export` wrote."""
    return os.path.isfile(path / MANIFEST) and os.path.isfile(path / MODEL)


def open_model(
    model: str | os.PathLike[str],
    *,
    restored: bool = True,
    task: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint | OnnxFolder:
    """Open anything that can be run: as `open_checkpoint`, or an ONNX folder."""
    path = Path(model)
    if is_onnx_folder(path) and task is None and base is None:
        return OnnxFolder(path, restored=restored, trust_remote_code=trust_remote_code)
    return open_checkpoint(
        model, restored=restored, task=task, revision=revision, trust_remote_code=trust_remote_code, base=base
    )


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    restored: bool = True,
    task: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a folder, a .gguf file or a hub id. Raises SwquantError with the remedy for anything else.

    restored: for a compressed checkpoint, whether outliers are laid back while reading. base: for a folder of patches
    alone, the model that they belong to. task: of a compressed checkpoint's pool.
    """
    path, name = _found(model, revision, code=trust_remote_code)
    if holds_patches(path):
        if task is not None or not restored:
            left = "--no-restore" if task is None else f"--task {task}"
            raise SwquantError(f"{model}: patches of an original are laid over it, all of them; leave out {left}")
        return _patched(path, base, trust_remote_code)
    if base is not None:
        raise SwquantError(f"{model}: is a model by itself, which has no base; leave out --base")
    if task is not None and not os.path.isfile(path / MANIFEST):
        raise SwquantError(f"{model}: --task {task} needs a compressed checkpoint with a pool (swquant adapt)")
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        if path.suffix.lower() != ".gguf":
            raise SwquantError(
                f"{path.name}: neither a folder nor a .gguf file; give the folder that holds config.json"
            )
        return GgufCheckpoint(path)
    if is_onnx_folder(path):
        raise SwquantError(
            f"{path.resolve().name}: an ONNX graph, which can only be run (swquant generate, swquant eval); "
            "use the checkpoint that it was made from"
        )
    if (path / MANIFEST).is_file():
        return CompressedCheckpoint(path, name=name, restored=restored, task=task, trust_remote_code=trust_remote_code)
    if not any(path.iterdir()):
        raise SwquantError(f"{model}: the folder is empty; give a folder saved by save_pretrained(), or a .gguf file")
    return SafetensorsCheckpoint(path, name=name, trust_remote_code=trust_remote_code)


def _found(model: str | os.PathLike[str], revision: str | None, *, code: bool) -> tuple[Path, str | None]:
    """The folder or file on this machine, and the name of what was fetched."""
    path = Path(model)
    if os.path.isfile(path) or os.path.isdir(path):
        return path, None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return _fetch(str(model), revision, code=code), str(model).rpartition("/")[2]
    raise SwquantError(f"{model}: no such folder or file that can be read, and not a hub id (OWNER/NAME)")


def _patched(path: Path, base: str | os.PathLike[str] | None, trust_remote_code: bool) -> PatchedCheckpoint:
    """Patches over their base."""
    if base is None:
        original = shown(read_manifest(path)["source"]["name"], 60)
        raise SwquantError(
            f"{path}: holds patches alone; name their model, {original}, with --base MODEL (eval, generate; base=MODEL in "
            f"Python), or write the whole: swquant merge {path} OUT --base MODEL"
        )
    opened = open_checkpoint(base, trust_remote_code=trust_remote_code)
    try:
        return PatchedCheckpoint(path, opened)
    except BaseException:
        opened.close()
        raise


def _fetch(repository: str, revision: str | None, *, code: bool) -> Path:
    """A hub repository's folder on this machine. Only safetensors and text files are fetched, never pickle; code, for
    who trusts it."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", CARD, *COMPANIONS, *(CODE if code else ())]
    never = [f"*{suffix}" for suffix in (*NEVER, *(() if code else (".py",)))]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=never))
    except Exception as error:  # the hub client raises a zoo of network and HTTP errors
        raise SwquantError(
            f"{repository}: not a folder here, and the hub did not give it ({first_line(error)}); check the name and the network, "
            "or give a local folder"
        ) from None
