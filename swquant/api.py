"""The Python interface, and what the commands call: one typed function for every verb. Users import it from `swquant`.

Each says in which order things happen and leaves them to the rooms of the verbs, which it imports when it is called:
whoever asks for a manifest does not wait for torch. `progress` is told what goes on; without it nothing is reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from exporters.errors import SwquantError
from swquant.cluster.workers import Workers, team
from swquant.compress.options import CompressKeywords, CompressOptions
from swquant.declared import made_of
from swquant.detect.prompt import DEFAULT_PROMPT
from swquant.export.formats import Planned, export_format, format_named, option_names
from swquant.export.gguf.options import GgufKeywords, GgufOptions
from swquant.export.onnx.options import ExportKeywords, ExportOptions
from swquant.progress import Progress, silent
from swquant.study.options import StudyKeywords, StudyOptions
from swquant.units import parse_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from swquant.checkpoints.base import Checkpoint
    from swquant.checkpoints.schema import Manifest
    from swquant.compress.pipeline import Compressed
    from swquant.detect.found import Found
    from swquant.evaluate.pipeline import Evaluation
    from swquant.export.gguf.pipeline import Written
    from swquant.export.mlx.pipeline import MlxFolder
    from swquant.export.onnx.pipeline import Exported
    from swquant.study.pipeline import Study

__all__ = ["compress", "detect", "evaluate", "export", "inspect", "load", "plan", "study", "verify"]

Model = str | os.PathLike[str]


class ExportWords(ExportKeywords, GgufKeywords, total=False):
    """Every option of `export`: those of the formats."""


class Keywords(CompressKeywords, ExportWords, total=False):
    """Every option of `compress`: its own, and those of the formats."""


def detect(
    model: Model,
    prompt: str = DEFAULT_PROMPT,
    *,
    low_memory: bool = False,
    memory: str | int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Found:
    """Find the super weights and super activations of a model with forward passes of one prompt.

    model: a Hugging Face folder, a .gguf file, a hub id or a compressed checkpoint. memory: what it may take, bytes
    or `12GB`; weights then stay in their files where they must (low_memory: always). Returns a `Found`, whose
    `detection` holds `super_weights`, `cancellers`, `super_activations` and per-layer maxima. Raises SwquantError.

    "The Super Weight in Large Language Models", https://arxiv.org/abs/2411.07191
    """
    import torch

    from swquant.checkpoints.open import open_checkpoint
    from swquant.detect.pipeline import find_super_weights
    from swquant.models.devices import device_for, place_for

    chosen = device_for(device)
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        place, said = place_for(checkpoint, torch.float32, chosen)
        with progress.step(f"Probing {checkpoint.name} with one prompt{said}"):
            low_memory = low_memory or _beyond(memory, checkpoint)
            return find_super_weights(checkpoint, prompt, low_memory=low_memory, device=place)


def compress(
    model: Model,
    out: Model | None = None,
    options: CompressOptions | None = None,
    *,
    format: str = "checkpoint",
    overwrite: bool = False,
    fresh: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    low_memory: bool = False,
    memory: str | int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_plan: Callable[[Planned], None] | None = None,
    progress: Progress = silent,
    **changes: Unpack[Keywords],
) -> Compressed | Exported | MlxFolder | Written:
    """Compress a model into a checkpoint that stock transformers and vLLM load, or at once into an ONNX folder, a GGUF
    file or a folder for MLX.

    out: what to create, `<name>-w4-b128` in the current folder by default. format: checkpoint, onnx, gguf or mlx.
    options and changes: a `CompressOptions`, or its fields as keywords (bits, block, symmetric, clip, restore,
    outliers, dense, …), and for onnx and gguf those of `export`. memory, low_memory, device: as for `detect`. on_plan:
    is shown the plan before anything is written. A run that was interrupted is taken up by the same call; fresh: start
    over. workers: so many processes round tensors, with the same result; ray: those of the Ray cluster at this address
    do. Returns path and manifest. Raises SwquantError; then `out` does not exist.
    """
    with _planned(
        model,
        out,
        options,
        format,
        changes,
        to_overwrite=overwrite,
        fresh=fresh,
        workers=Workers(workers, ray),
        low_memory=low_memory,
        memory=memory,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    ) as planned:
        if on_plan is not None:
            on_plan(planned)
        return planned.run(overwrite=overwrite, fresh=fresh, progress=progress)


def plan(
    model: Model,
    out: Model | None = None,
    options: CompressOptions | None = None,
    *,
    format: str = "checkpoint",
    low_memory: bool = False,
    memory: str | int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **changes: Unpack[Keywords],
) -> Planned:
    """What `compress` would do, tensor by tensor; writes nothing. Takes the same, raises the same."""
    with _planned(
        model,
        out,
        options,
        format,
        changes,
        low_memory=low_memory,
        memory=memory,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    ) as planned:
        return planned


@contextmanager
def _planned(
    model: Model,
    out: Model | None,
    options: CompressOptions | None,
    format: str,
    changes: Mapping[str, Any],
    *,
    to_overwrite: bool | None = None,
    fresh: bool = False,
    workers: Workers | None = None,
    low_memory: bool,
    memory: str | int | None,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> Iterator[Planned]:
    """The plan, while its model is open. to_overwrite: whether OUT may be replaced, None if nothing will be written."""
    row, of_formats = format_named(format), option_names(beside=CompressOptions)
    own = {name: value for name, value in changes.items() if name not in of_formats}
    given = {name: value for name, value in changes.items() if name in of_formats and value is not None}
    chosen = made_of(CompressOptions, options, own)
    export_to = row.chosen({**given, **row.shared(chosen)}, int8=chosen.activations == "int8")
    chosen = row.suited(chosen, export_to)
    row.require()
    from swquant.checkpoints.open import open_checkpoint
    from swquant.compress.pipeline import prepare
    from swquant.compress.resuming import check_leftover, head_of, identity, leftover_sentence
    from swquant.models.devices import device_for

    workers = workers or Workers()
    workers.check()
    if not workers.here and device not in ("auto", "cpu"):
        raise SwquantError(f"--device {device}: workers round on the CPU; leave out one of the two")
    place = device_for(device if workers.here else "cpu")
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint, ExitStack() as stack:
        target = Path(out) if out is not None else Path(checkpoint.name + chosen.suffix + row.suffix)
        if to_overwrite is not None:
            row.check_out(target, to_overwrite, checkpoint)
            if row.stock and not fresh:
                check_leftover(target, identity(checkpoint, chosen, place.type))
        working = stack.enter_context(team(workers))
        low_memory = low_memory or _beyond(memory, checkpoint, chosen.own_tokens, writes=chosen.text_from is None)
        prepared = prepare(
            checkpoint,
            chosen,
            low_memory=low_memory,
            stock=row.stock,
            kept=row.export is None,
            team=working,
            device=place,
            progress=progress,
        )
        left = ""
        if row.stock:  # what a checkpoint left on its way; a file is written again from its beginning
            left = leftover_sentence(target, head_of(prepared.checkpoint, prepared.found, prepared.plan, place.type))
        yield Planned(row.fitted(prepared, export_to), target, row, export_to, left)


def _beyond(memory: str | int | None, checkpoint: Checkpoint, tokens: int = 0, *, writes: bool = True) -> bool:
    """Whether the model's weights have to stay in their files for the limit that was given."""
    from swquant.models.memory import must_stay_on_disk

    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    return limit is not None and must_stay_on_disk(checkpoint, limit, tokens=tokens, writes=writes)


def export(
    checkpoint: Model,
    out: Model,
    options: ExportOptions | GgufOptions | None = None,
    *,
    format: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **changes: Unpack[ExportWords],
) -> Exported | MlxFolder | Written:
    """Export a compressed checkpoint: to an ONNX folder, checked to give the same answers, a GGUF file, or MLX.

    out: what to create. format: onnx, gguf or mlx; by default gguf where `out` ends in .gguf. options and changes: an
    `ExportOptions` or `GgufOptions`, or its fields as keywords (graph, type, …). device: where torch says what ONNX is
    compared with, or rounds for GGUF. Returns path and manifest. Raises SwquantError; then there is no `out`.
    """
    row, path = export_format(Path(out), format), Path(checkpoint)
    if options is not None and (row.options is None or not isinstance(options, row.options)):
        needed = "leave them out" if row.options is None else f"give {row.options.__name__}"
        raise SwquantError(f"{type(options).__name__} say nothing of format {row.name}; {needed}")
    chosen = row.chosen({**(asdict(options) if options else {}), **changes}, int8=False, resolve=False)
    row.require()
    from swquant.checkpoints.compressed import CompressedCheckpoint
    from swquant.checkpoints.manifest import MANIFEST
    from swquant.checkpoints.open import is_onnx_folder
    from swquant.models.devices import device_for

    place = device_for(device)
    if is_onnx_folder(path):
        raise SwquantError(f"{path}: already exported; give the checkpoint that it was made from")
    if not (path / MANIFEST).is_file():
        raise SwquantError(f"{path}: not a compressed checkpoint; make one first: swquant compress MODEL OUT")
    with CompressedCheckpoint(path, unrounded=True, trust_remote_code=trust_remote_code) as opened:
        assert row.export is not None
        return row.export(opened, Path(out), chosen, {"overwrite": overwrite, "device": place, "progress": progress})


def load(
    path: Model,
    *,
    base: Model | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    restore: bool = True,
    task: str | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The transformers model of a compressed checkpoint (or of anything that `detect` takes), in evaluation mode.

    Its weights are dense, every outlier has its original value, and int8 activations are simulated, exactly. base: the
    model, where `tune` wrote patches alone. dtype: of the weights, by default their own. restore: False leaves outliers
    as a loader sees them that ignores the sidecar. task: lays the set of the pool that serves it; `auto` lets every
    input choose. trainable: in float32, and what `tune` trained (`values` of `PatchedLinear`s) is a parameter; all else
    is frozen, and weights under it stay packed. Raises SwquantError.
    """
    from swquant.checkpoints.open import open_checkpoint
    from swquant.models.loading import running_model

    how: dict[str, Any] = {"restored": restore, "task": task, "base": base}
    with open_checkpoint(path, trust_remote_code=trust_remote_code, **how) as checkpoint:
        if trainable:
            from swquant.training.model import load_trainable

            return load_trainable(checkpoint, device)
        return running_model(checkpoint, dtype, device)


def inspect(path: Model) -> Manifest:
    """The manifest of a folder made by swquant: what is in it, how it was made. Raises SwquantError if it has none."""
    from swquant.checkpoints.manifest import read_manifest

    return read_manifest(Path(path))


def verify(path: Model, *, loads: bool = False, trust_remote_code: bool = False) -> list[str]:
    """Read every byte of a folder made by swquant and compare it with the manifest. Returns what is wrong.

    loads: also let the stock loader look at it, without memory for the weights (of an ONNX folder: with ONNX Runtime,
    in full). Raises SwquantError where there is no intact manifest."""
    from swquant.output.verification import verify as verify_folder

    problems = verify_folder(Path(path))
    if loads and not problems:
        from swquant.models.loads import loading_of

        loading = loading_of(Path(path), trust_remote_code=trust_remote_code)
        problems += [loading.problem] if loading.problem else []
    return problems


def evaluate(
    model: Model,
    text: str,
    against: Model | None = None,
    *,
    window: int = 2048,
    limit: int | None = None,
    restore: bool = True,
    task: str | None = None,
    base: Model | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a model on a text; against an original also KL divergence (nats), top-1 agreement and
    the expected acceptance rate of speculative decoding (both 0 to 1), by the protocol of docs/evaluation.md.

    window: tokens per window. limit: evaluate only the first so many windows. restore, task, base: see `load`. Raises
    SwquantError."""
    from swquant.checkpoints.open import open_model
    from swquant.evaluate.pipeline import evaluate_model
    from swquant.models.devices import device_for

    how: dict[str, Any] = {"window": window, "limit": limit, "device": device_for(device), "progress": progress}
    with open_model(model, restored=restore, task=task, base=base, trust_remote_code=trust_remote_code) as checkpoint:
        if against is None:
            return evaluate_model(checkpoint, text, **how)
        with open_model(against, trust_remote_code=trust_remote_code) as original:
            return evaluate_model(checkpoint, text, original, **how)


def study(
    model: Model,
    text: str,
    out: Model | None = None,
    options: StudyOptions | None = None,
    *,
    text_name: str = "text",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **changes: Unpack[StudyKeywords],
) -> Study:
    """Repeat the super weight paper's experiments on a model and write a report.

    text: what to measure on; text_name: what the report calls it. out: the folder of the report, `<name>-study` by
    default; an earlier study there gives what it measured already. options and changes: a `StudyOptions`, or its fields
    as keywords (only, quick, …). device: as for `detect`. Returns path, sections (sentences, tables, charts) and
    the record that study.json holds. Raises SwquantError.
    """
    chosen = made_of(StudyOptions, options, changes)
    from swquant.checkpoints.open import open_checkpoint
    from swquant.models.devices import device_for
    from swquant.study.pipeline import study_checkpoint

    how: dict[str, Any] = {"text_name": text_name, "device": device_for(device), "progress": progress}
    with open_checkpoint(model, trust_remote_code=trust_remote_code) as checkpoint:
        target = Path(out) if out is not None else Path(f"{checkpoint.name}-study")
        return study_checkpoint(checkpoint, text, target, chosen, **how)
