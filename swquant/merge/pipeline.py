"""`merge`, from end to end: the only module that knows the order of things.

    plan: which sets, which tensors -> the tuned model's own text -> per tensor: decode with patches, round
    -> KL to the tuned model, on other text of its own -> write

Only tensors that lose a patch are rounded anew, on the scales that they have. So a weight that no block moved is on a
code already and mostly keeps it, and what a block moved by less than half a step is not simply lost: error feedback
(`calibrationless.feed_back`) hands it on to the weights that are rounded later. Where no text reaches a tensor, and for
GPT-2's Conv1D, every weight takes its nearest code. Everything else of OUT is the input, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrationless import CPU, Factor, Points, WeightError, dequantize, feed_back, measure, moved, restore
from exporters import layouts
from exporters.errors import SwquantError
from exporters.sidecar import OUTLIERS, SETS
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.patch_sets import counted
from swquant.checkpoints.patched import PatchedCheckpoint
from swquant.checkpoints.schema import CheckpointManifest, MergeRecord, RoundedRecord
from swquant.checkpoints.tokenizer import begins_with
from swquant.detect.own_text import self_text
from swquant.detect.pipeline import find_super_weights
from swquant.detect.texts import length_for, write_text
from swquant.evaluate.pipeline import evaluate_model
from swquant.merge.options import MergeOptions
from swquant.models.architecture import describe
from swquant.models.devices import place_for
from swquant.models.loading import running_model
from swquant.output.destination import check_destination
from swquant.output.rewritten import Changes, rewrite
from swquant.progress import Progress, silent
from swquant.training.losses import divergence
from swquant.training.over_original import write_whole
from swquant.units import short

__all__ = ["MergePlan", "Merged", "make_plan", "merge_checkpoint", "merge_patches"]

_JUDGED = 4  # texts that the result is judged on


@dataclass(frozen=True)
class MergePlan:
    """What will be done. sets: that become part of the codes. tensors: that lose a patch by it, in the order of the
    layers."""

    checkpoint: CompressedCheckpoint
    options: MergeOptions
    sets: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Merged:
    """What was written. manifest, record: of a checkpoint; None of an ordinary folder, which has none and cost nothing.
    evaluation: measure -> (without the patches, with them, merged) on a text, {} without one."""

    path: Path
    manifest: CheckpointManifest | None = None
    record: MergeRecord | None = None
    evaluation: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)


def make_plan(checkpoint: Checkpoint, options: MergeOptions) -> MergePlan:
    """Which sets and tensors. Raises SwquantError where there is nothing to merge."""
    if not isinstance(checkpoint, CompressedCheckpoint):
        raise SwquantError(f"{checkpoint.name}: not a compressed checkpoint; merge bakes patches into its codes")
    blocks = tuple(name for name in checkpoint.sets if name not in SETS)
    if odd := next((name for name in options.set_ if name not in blocks), None):
        raise SwquantError(f"--set {odd}: {checkpoint.name} has the sets {', '.join(blocks) or 'of no blocks at all'}")
    sets = (*((OUTLIERS,) if options.points else ()), *(options.set_ or blocks))
    there = {of_set: names for of_set, names in counted(checkpoint.manifest).items() if of_set in sets}
    if not there:
        other = "" if options.points else "; --points merges outliers"
        raise SwquantError(f"{checkpoint.name}: holds no blocks that were trained, so there is nothing to merge{other}")
    weights = describe(checkpoint).weights
    touched = [name for name in checkpoint.tensors if any(name in names for names in there.values())]
    touched.sort(key=lambda name: weights[name].layer if name in weights else -1)
    return MergePlan(checkpoint, options, tuple(there), tuple(touched))


def merge_checkpoint(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    eval_text: str | None = None,
    against: Checkpoint | None = None,
    device: torch.device = CPU,
) -> Merged:
    """Carry out a plan. `out` appears whole or not at all. eval_text: to measure on; against: the original to compare
    with there, by default the tuned model. device: where models run, if they fit, and tensors are rounded. Raises
    SwquantError."""
    checkpoint = plan.checkpoint
    check_destination(out, overwrite, checkpoint)
    pieces: list[_Piece] = []
    with _inputs_of(plan, progress, device) as inputs_of, progress.bytes("Merging", _bytes(plan)) as bar:
        for name in plan.tensors:
            pieces.append(_merged(plan, name, inputs_of, device))
            bar.advance(name, checkpoint.tensors[name].nbytes)
    record = _record(plan, len(pieces), *_cost(plan, pieces, progress, device))
    manifest = rewrite(checkpoint, out, _changes(plan, pieces, record), overwrite=overwrite, progress=progress)
    evaluation = {} if eval_text is None else _evaluated(checkpoint, out, eval_text, against, progress, device)
    return Merged(out, manifest, record, evaluation)


def merge_patches(
    patched: PatchedCheckpoint,
    options: MergeOptions,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Merged:
    """Write the model that patches belong to, with them in it, as an ordinary Hugging Face folder. Raises
    SwquantError."""
    if options.set_ or options.points:
        raise SwquantError(
            f"{patched.name}: holds patches of an original, and all are merged; leave out --set and --points"
        )
    manifest = patched.manifest
    write_whole(patched, out, patched.read, manifest["source"], manifest["tuned"], progress, overwrite=overwrite)
    return Merged(out)


def _bytes(plan: MergePlan) -> int:
    return sum(plan.checkpoint.tensors[name].nbytes for name in plan.tensors)


Statistics = Callable[[str], tuple[Factor | None, Tensor | None]]


@contextmanager
def _inputs_of(plan: MergePlan, progress: Progress, device: torch.device) -> Iterator[Statistics]:
    """Stored name -> factor and energy of its inputs on text of the tuned model, None where no text reaches."""
    checkpoint, options = plan.checkpoint, plan.options
    if not options.texts:
        yield lambda name: (None, None)
        return
    with progress.step(f"Probing {checkpoint.name} with one prompt"):
        found = find_super_weights(checkpoint, checkpoint.manifest["detection"]["prompt"], device=device)
    names = [name for name in plan.tensors if name in found.architecture.weights]
    with self_text(
        checkpoint,
        found,
        names,
        texts=options.texts,
        text_from=None,
        low_memory=False,
        seed=options.seed,
        progress=progress,
        device=device,
    ) as text:
        yield lambda name: (text.statistics(name, None) if name in names else None) or (None, None)


@dataclass(frozen=True)
class _Piece:
    """A tensor without the merged patches. parts: stored name -> tensor. kept: outliers that stay in the sidecar, with
    the values that they have now. decoded: what a loader gets of both, like the weight. error: of that; None of a dense
    tensor, which loses nothing. points: its super weights for the record."""

    name: str
    parts: Mapping[str, Tensor]
    decoded: Tensor
    kept: Points | None = None
    error: WeightError | None = None
    points: tuple[dict[str, Any], ...] = ()


def _merged(plan: MergePlan, name: str, inputs_of: Statistics, device: torch.device) -> _Piece:
    """One tensor, as it is with the merged sets alone laid over it, in codes. It is rounded on the device, and comes
    back to the CPU."""
    checkpoint = plan.checkpoint
    record = checkpoint.manifest["tensors"][name]
    target = checkpoint.read_without(
        name, *(of_set for of_set in checkpoint.sets if of_set not in (*plan.sets, OUTLIERS))
    )
    if "dense" in record:
        return _Piece(name, {name: target}, target)
    old, outliers = (
        checkpoint.quantized(name),
        [patch for patch in checkpoint.patches(name) if isinstance(patch, Points)],
    )
    # A block may have moved the outliers that stay: they are read anew.
    kept = [Points.at(target, patch.rows, patch.cols) for patch in outliers if OUTLIERS not in plan.sets]
    factor, energy = inputs_of(name)
    patches = moved([*kept, *_super_weights(target, record)], device)
    new = moved(feed_back(moved(target, device), moved(old, device), moved(factor, device), *patches), CPU)
    module = name.removesuffix(".weight")
    int8_inputs = {f"{module}.weight", f"{module}.weight_scale"} == set(record["sha256"])
    parts = layouts.to_tensors(new, int8_inputs=int8_inputs)
    bare = dequantize(new)
    points = tuple(
        {**item, "without_sidecar": float(bare[item["row"], item["col"]])} for item in record.get("super_weights", ())
    )
    error = measure(target, new, *kept, importance=moved(energy, CPU))
    named = {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return _Piece(name, named, restore(bare, *kept), kept[0] if kept else None, error, points)


def _cost(plan: MergePlan, pieces: Sequence[_Piece], progress: Progress, device: torch.device) -> tuple[float, float]:
    """KL to the tuned model, on a little text that this writes: of the model as those see it who ignore the sidecar,
    and of the merged one."""
    checkpoint = plan.checkpoint
    place, said = place_for(checkpoint, torch.float32, device, copies=2)
    with progress.step(f"Measuring what it costs{said}"), torch.no_grad():
        tuned = running_model(checkpoint, torch.float32, place)
        start, length = begins_with(checkpoint), length_for(checkpoint)
        tokens = write_text(tuned, start, plan.options.seed + 1, silent, texts=_JUDGED, length=length).to(place)
        goals = [tuned(input_ids=row.unsqueeze(0), use_cache=False).logits for row in tokens]

        def distance(other: Checkpoint) -> float:
            model = running_model(other, torch.float32, place)
            found = (model(input_ids=row.unsqueeze(0), use_cache=False).logits for row in tokens)
            every = torch.ones(1, tokens.shape[1], dtype=torch.bool, device=place)
            return sum(float(divergence(mine, goal, every)) for mine, goal in zip(found, goals, strict=True)) / len(
                goals
            )

        with CompressedCheckpoint(
            checkpoint.folder, restored=False, trust_remote_code=checkpoint.trust_remote_code
        ) as without:
            lost = distance(without)
        with _Replaced(checkpoint, {piece.name: piece.decoded for piece in pieces}) as merged:
            return lost, distance(merged)


class _Replaced(CompressedCheckpoint):
    """The checkpoint with other tensors in the place of some, as it will be written."""

    def __init__(self, checkpoint: CompressedCheckpoint, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
        self._replaced = tensors

    def read(self, name: str) -> Tensor:
        return self._replaced[name] if name in self._replaced else super().read(name)


def _super_weights(target: Tensor, record: RoundedRecord) -> list[Points]:
    """Super weights keep a code of their own value: without the sidecar their block is all that represents them."""
    places = [(item["row"], item["col"]) for item in record.get("super_weights", ())]
    return [Points.at(target, *torch.tensor(places).T)] if places else []


def _changes(plan: MergePlan, pieces: Sequence[_Piece], record: MergeRecord) -> Changes:
    manifest = plan.checkpoint.manifest
    measured: dict[str, dict[str, Any]] = {}
    for piece in pieces:
        if piece.error is not None:
            errors = {"relative_error": piece.error.relative, "largest_error": piece.error.largest}
            errors |= {} if piece.error.output is None else {"output_error": piece.error.output}
            measured[piece.name] = {key: short(value) for key, value in errors.items()}
        if piece.points:
            measured[piece.name]["super_weights"] = list(piece.points)
    tuned = {name: item for name, item in manifest.get("tuned", {}).items() if name not in plan.sets}
    return Changes(
        parts={name: tensor for piece in pieces for name, tensor in piece.parts.items()},
        patches={OUTLIERS: {piece.name: piece.kept for piece in pieces if piece.kept is not None}},
        without=plan.sets,
        records=measured,
        content={"tuned": tuned or None, "merged": [*manifest.get("merged", []), record]},
    )


def _record(plan: MergePlan, tensors: int, without: float, merged: float) -> MergeRecord:
    """What the manifest says."""
    return {
        "base": plan.checkpoint.manifest["digest"],
        "sets": list(plan.sets),
        "texts": plan.options.texts,
        "seed": plan.options.seed,
        "tensors": tensors,
        "kl_without": short(without),
        "kl_merged": short(merged),
    }


def _evaluated(
    checkpoint: CompressedCheckpoint,
    out: Path,
    text: str,
    against: Checkpoint | None,
    progress: Progress,
    device: torch.device,
) -> dict[str, tuple[float, float, float]]:
    """What `evaluate` says without the patches, with them, and of OUT, in windows of 512 tokens at most."""
    trust = checkpoint.trust_remote_code
    with (
        CompressedCheckpoint(checkpoint.folder, restored=False, trust_remote_code=trust) as without,
        CompressedCheckpoint(out, trust_remote_code=trust) as merged,
    ):
        found = [
            asdict(evaluate_model(model, text, against or checkpoint, window=512, device=device, progress=progress))
            for model in (without, checkpoint, merged)
        ]
    return {name: (found[0][name], found[1][name], found[2][name]) for name in ("perplexity", "kl", "top1")}
