"""The Python interface: what the commands do, as typed functions. Users import it from `swquant`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import MANIFEST, read_manifest
from swquant.checkpoints.onnx import GRAPH
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import Compressed, compress_checkpoint, prepare
from swquant.detect.found import Found
from swquant.detect.pipeline import find_super_weights
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.evaluate.pipeline import Evaluation, evaluate_model, generate_text
from swquant.export.onnx.options import FORMATS, ExportOptions, export_options
from swquant.models.loading import running_model
from swquant.models.runtime import require_exporter
from swquant.output.destination import check_destination
from swquant.output.verification import verify as verify_folder
from swquant.progress import Progress, silent
from swquant.study.options import StudyOptions
from swquant.study.pipeline import Study, study_checkpoint

if TYPE_CHECKING:
    from swquant.export.onnx.pipeline import Exported

__all__ = ["compress", "detect", "evaluate", "export", "generate", "inspect", "load", "study", "verify"]

Model = str | os.PathLike[str]


def detect(
    model: Model, prompt: str = DEFAULT_PROMPT, *, low_memory: bool = False, trust_remote_code: bool = False
) -> Found:
    """Find the super weights and super activations of a model with forward passes of one prompt.

    model: a Hugging Face folder, a .gguf file, a hub id or a compressed checkpoint. Returns a `Found`, whose `detection`
    holds `super_weights`, `cancellers`, `super_activations` and per-layer maxima. Raises SwquantError.

    "The Super Weight in Large Language Models", https://arxiv.org/abs/2411.07191
    """
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        return find_super_weights(checkpoint, prompt, low_memory=low_memory)


def compress(
    model: Model,
    out: Model | None = None,
    *,
    overwrite: bool = False,
    low_memory: bool = False,
    trust_remote_code: bool = False,
    format: str = "checkpoint",
    **options: Any,
) -> Compressed | Exported:
    """Compress a model into a checkpoint that stock transformers and vLLM load, or at once into an ONNX folder.

    out: the folder to create, `<name>-w4-b128` in the current folder by default. format: checkpoint or onnx. options: the
    fields of `CompressOptions` (bits, block, symmetric, clip, restore, outliers, dense, …), and for onnx those of `export`.
    Returns path and manifest. Raises SwquantError; then `out` does not exist.
    """
    of_export = {field.name for field in fields(ExportOptions)}
    export_to = export_options(format, {name: value for name, value in options.items() if name in of_export})
    chosen = CompressOptions(**{name: value for name, value in options.items() if name not in of_export})
    if export_to is not None:
        require_exporter()
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        target = Path(out) if out is not None else Path(checkpoint.name + chosen.suffix + FORMATS[format])
        if export_to is None:
            return compress_checkpoint(checkpoint, target, chosen, overwrite=overwrite, low_memory=low_memory)
        from swquant.export.onnx.pipeline import write_exported

        check_destination(target, overwrite, checkpoint)
        prepared = prepare(checkpoint, chosen, low_memory=low_memory)
        return write_exported(prepared, target, export_to, overwrite=overwrite)


def export(
    checkpoint: Model,
    out: Model,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Exported:
    """Export a compressed checkpoint to an ONNX folder, and check that it gives the same answers.

    out: the folder to create. options: the fields of `ExportOptions` (graph, precision, accuracy_level, …). Returns path
    and manifest. Raises SwquantError; then `out` does not exist. Needs the extra `cpu` or `gpu`.
    """
    require_exporter()
    from swquant.export.onnx.pipeline import export_checkpoint

    chosen, path = ExportOptions(**options), Path(checkpoint)
    if (path / GRAPH).is_file():
        raise SwquantError(f"{path}: already exported; give the checkpoint that it was made from")
    if not (path / MANIFEST).is_file():
        raise SwquantError(f"{path}: not a compressed checkpoint; make one first: swquant compress MODEL OUT")
    with CompressedCheckpoint(path, unrounded=True, trust_remote_code=trust_remote_code) as opened:
        return export_checkpoint(opened, Path(out), chosen, overwrite=overwrite, progress=progress)


def load(
    path: Model,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    restore: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The transformers model of a compressed checkpoint (or of anything that `detect` takes), in evaluation mode.

    Its weights are dense, every outlier has its original value, and int8 activations are simulated, exactly. dtype: of the weights, the checkpoint's own by default.
    restore: False leaves the outliers as a loader sees them that ignores the sidecar. Raises SwquantError.
    """
    with open_checkpoint(path, restored=restore, trust_remote_code=trust_remote_code) as checkpoint:
        return running_model(checkpoint, dtype, device)


def inspect(path: Model) -> Mapping[str, Any]:
    """The manifest of a compressed checkpoint: what is in it and how it was made. Raises SwquantError if it has none."""
    return read_manifest(Path(path))


def verify(path: Model) -> list[str]:
    """Read every byte of a compressed checkpoint and compare it with the manifest. Returns what is wrong, [] if nothing.

    Raises SwquantError where there is no intact manifest.
    """
    return verify_folder(Path(path))


def evaluate(
    model: Model,
    text: str,
    against: Model | None = None,
    *,
    window: int = 2048,
    limit: int | None = None,
    restore: bool = True,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Perplexity of a model on a text; against an original also KL divergence and top-1 agreement.

    window: tokens per window. limit: evaluate only the first so many windows. restore: see `load`. The protocol is
    described in `swquant.evaluation` and docs/evaluation.md. Raises SwquantError.
    """
    with open_checkpoint(model, restored=restore, trust_remote_code=trust_remote_code) as checkpoint:
        if against is None:
            return evaluate_model(checkpoint, text, window=window, limit=limit)
        with open_checkpoint(against, trust_remote_code=trust_remote_code) as original:
            return evaluate_model(checkpoint, text, original, window=window, limit=limit)


def generate(
    model: Model, prompt: str, *, tokens: int = 40, restore: bool = True, trust_remote_code: bool = False
) -> str:
    """Continue a prompt greedily. Returns the prompt and what follows. Raises SwquantError."""
    with open_checkpoint(model, restored=restore, trust_remote_code=trust_remote_code) as checkpoint:
        return generate_text(checkpoint, prompt, tokens=tokens)


def study(
    model: Model, text: str, out: Model | None = None, *, trust_remote_code: bool = False, **options: Any
) -> Study:
    """Repeat the super weight paper's experiments on a model and write a report.

    text: what to measure on. out: the folder of the report, `<name>-study` by default; an earlier study there gives what it
    measured already. options: the fields of `StudyOptions` (only, quick, window, limit, bits, prompt). Returns path,
    sections (sentences, tables, charts) and the record that study.json holds. Raises SwquantError.
    """
    chosen = StudyOptions(**options)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        target = Path(out) if out is not None else Path(f"{checkpoint.name}-study")
        return study_checkpoint(checkpoint, text, target, chosen)
