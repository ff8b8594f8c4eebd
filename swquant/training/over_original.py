"""What was trained over a model that is no compressed checkpoint: its blocks alone, or the whole model with them in it.

write_patches   a folder of a few megabytes, bound to the model (`checkpoints.patched` reads it)
write_whole     an ordinary Hugging Face folder in the model's own dtype: the blocks are added, once, in float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor

from calibrationless import Blocks
from exporters.sidecar import SIDECAR, PlannedPatch, SidecarWriter
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.manifest import write_manifest
from swquant.checkpoints.patched import sha256_of
from swquant.checkpoints.schema import PatchesContent, PatchesManifest, SourceRecord, TuningRecord
from swquant.output.card import write_patches_card
from swquant.output.dense import Written, dense_folder, stored_form, with_dtype
from swquant.output.destination import check_destination, check_space, replace, unfinished, writing
from swquant.output.verification import check_result, file_table
from swquant.progress import Progress, silent
from swquant.version import __version__

__all__ = ["RECORD", "source_of", "write_patches", "write_whole"]

RECORD = "tuned.json"


def write_patches(
    checkpoint: Checkpoint,
    out: Path,
    of_set: str,
    blocks: Mapping[str, Blocks],
    record: TuningRecord,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> PatchesManifest:
    """Write a set of blocks (stored name -> blocks) into OUT, which is verified and appears whole or not at all. Raises
    SwquantError."""
    check_destination(out, overwrite, checkpoint)
    check_space(out, record["bytes"])
    shapes = {name: (checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in blocks}
    planned = [
        PlannedPatch(of_set, name, len(patch), shapes[name], patch.values.dtype, patch.side, patch.mode)
        for name, patch in blocks.items()
    ]
    with writing(out, record["bytes"]), unfinished(out) as folder:
        (folder / SIDECAR).parent.mkdir()
        with closing(SidecarWriter(folder / SIDECAR, planned)) as writer:
            for name, patch in blocks.items():
                writer.write(of_set, name, patch)
            writer.finish()
        content: PatchesContent = {
            "kind": "patches",
            "swquant": __version__,
            "source": source_of(checkpoint),
            "tensors": {
                name: {
                    "shape": list(shapes[name]),
                    "sha256": sha256_of(checkpoint.read(name)),
                    "blocks": {of_set: len(patch)},
                }
                for name, patch in blocks.items()
            },
            "tuned": {of_set: record},
            "files": {},
            "totals": {"bytes": 0},
        }
        write_patches_card(folder, checkpoint, content)
        content["files"] = file_table(folder)
        content["totals"]["bytes"] = sum(entry["bytes"] for entry in content["files"].values())
        manifest = write_manifest(folder, content)
        check_result(folder, out, progress)
        replace(folder, out, overwrite)
    return manifest


def write_whole(
    checkpoint: Checkpoint,
    out: Path,
    read: Callable[[str], Tensor],
    source: SourceRecord,
    tuned: Mapping[str, TuningRecord],
    progress: Progress = silent,
    *,
    overwrite: bool = False,
) -> None:
    """Write the model as an ordinary Hugging Face folder. read: stored name -> tensor, blocks in it. source: the model
    without them; tuned: set of blocks -> how it was trained. Raises SwquantError; then `out` does not exist, or is
    what it was."""
    tensors = {name: Written(stored_form(checkpoint, name), partial(read, name)) for name in checkpoint.tensors}
    config = with_dtype(checkpoint.raw_config, tensors)
    record = {"swquant": __version__, "source": source, "tuned": tuned}
    with dense_folder(checkpoint, out, tensors, config, (RECORD, record), progress, overwrite=overwrite):
        pass


def source_of(checkpoint: Checkpoint) -> SourceRecord:
    """What a record says of the model that was trained over."""
    return {"name": checkpoint.name, "kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint}
