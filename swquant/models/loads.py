"""Whether what stands in a folder can be loaded by those who know nothing of swquant: `verify --loads`.

A checkpoint is rehearsed as `compress` rehearses a plan: stock transformers builds its model without memory for the
weights, from the folder's own config.json and from the names, shapes and dtypes in the headers of its files. Of an ONNX
folder ONNX Runtime opens the graph, without the operator library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from exporters.errors import SwquantError
from exporters.json_file import read_json
from exporters.safetensors_file import SafetensorsReader
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import holds_patches
from swquant.checkpoints.open import open_model
from swquant.checkpoints.shards import shard_names
from swquant.models.rehearsal import Rehearsal, rehearse
from swquant.models.runtime import open_session
from swquant.pr_moe import PrMoeConfig

__all__ = ["Loading", "loading_of"]

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Loading:
    """What a stock loader makes of a folder. text: what it met, in a sentence. problem: why it does not load it, "" if
    it does."""

    text: str
    problem: str = ""


def loading_of(folder: Path, *, trust_remote_code: bool = False) -> Loading:
    """Let the stock loader of a folder look at it. Raises SwquantError for a folder that `compress` and `export` did
    not write, and for one that is damaged."""
    if holds_patches(folder):
        raise SwquantError(f"{folder}: patches alone, which no stock loader takes; leave out --loads")
    with open_model(folder, restored=True, trust_remote_code=trust_remote_code) as model:
        if isinstance(model, CompressedCheckpoint):
            return _by_transformers(model)
        if hasattr(model, "graph"):
            return _by_onnxruntime(model.graph)
    raise SwquantError(f"{folder}: not a compressed checkpoint; make one first: swquant compress MODEL OUT")


def _by_transformers(checkpoint: CompressedCheckpoint) -> Loading:
    layout = _stored(checkpoint.folder)
    rehearsal = rehearse(checkpoint, read_json(checkpoint.folder / "config.json"), layout)
    loader = f"stock transformers {transformers.__version__}"
    if isinstance(checkpoint.config, PrMoeConfig):
        loader = f"transformers {transformers.__version__}, told of mixtures by swquant.pr_moe,"
    if problem := _problem(rehearsal, layout):
        said = checkpoint.manifest["loaders"].get("transformers", "").startswith("no")
        remedy = (
            "as its manifest says; use swquant.load, or import swquant.hf" if said else "compress the original again"
        )
        return Loading("", f"{checkpoint.name}: {loader} does not load it ({problem}); {remedy}")
    met, count = len(layout) - len(rehearsal.unexpected), len(layout)
    unused = f", {count - met} it has no use for, as in the original" if met < count else ""
    return Loading(f"{loader} loads it: {met} of {count} weights meet{unused}, names, shapes and dtypes")


def _problem(rehearsal: Rehearsal, layout: Layout) -> str:
    """In a few words, "" if all is well."""
    if rehearsal.problem:
        return rehearsal.problem
    if rehearsal.recast:
        name = rehearsal.recast[0]
        return f"{name} is stored as {str(layout[name][0]).removeprefix('torch.')}, which the model does not expect"
    return ""


def _stored(folder: Path) -> Layout:
    """What the headers of the weight files announce."""
    layout: Layout = {}
    for shard in shard_names(folder):
        with SafetensorsReader(folder / shard) as reader:
            layout |= {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()}
    return layout


def _by_onnxruntime(graph: Path) -> Loading:
    session = open_session(graph, library=False)
    import onnxruntime

    count = len(session.get_inputs())
    return Loading(f"onnxruntime {onnxruntime.__version__} loads it, without swquant's operators, too: {count} inputs")
