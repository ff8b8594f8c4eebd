"""The plan: how many blocks are trained, of which weights, on what text. What can be refused is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.patched import PatchedCheckpoint
from swquant.checkpoints.tokenizer import context_of
from swquant.models.architecture import describe
from swquant.models.stock import empty_model
from swquant.training.data import Corpus, conversations, text_windows
from swquant.training.model import linear_names
from swquant.tune.options import TuneOptions
from swquant.tune.selection import Candidate, candidates

__all__ = ["TunePlan", "make_plan", "nbytes_of"]


def nbytes_of(count: int, side: int) -> int:
    """What so many blocks take in the sidecar: bfloat16 values and two indices each."""
    return count * (2 * side**2 + 8)


@dataclass(frozen=True)
class TunePlan:
    """What will be done. given: the text that was given, None where the original writes it. data: what to call it.
    count, of_blocks: how many blocks are trained, and of how many. scales: rounded weights whose scales are trained ->
    how many numbers these are. left_out: weights that cannot be patched -> why. weights, rounded: how many there are in
    all, and how many budgets in bits are counted on: those that are rounded, of an original all of the linear layers.
    whole: whether an original is written with its blocks in it, instead of the blocks alone."""

    checkpoint: Checkpoint
    against: Checkpoint | None
    options: TuneOptions
    given: Corpus | None
    data: str
    pool: Mapping[str, Candidate]
    left_out: Mapping[str, str]
    count: int
    of_blocks: int
    weights: int
    rounded: int
    scales: Mapping[str, int] = field(default_factory=dict)
    whole: bool = False

    @property
    def select(self) -> str:
        """By what blocks are chosen."""
        recovers = self.against is not None and self.checkpoint.is_compressed
        return self.options.select or ("recovery" if recovers else "gradient")

    @property
    def nbytes(self) -> int:
        """What the blocks take in the sidecar."""
        return nbytes_of(self.count, self.options.block)

    @property
    def more_bits(self) -> float:
        """The same per rounded weight."""
        return 8 * self.nbytes / max(self.rounded, 1)

    @property
    def tokens(self) -> int:
        """How many tokens the steps read."""
        return self.options.steps * self.options.batch * self.options.window

    @property
    def memory(self) -> int:
        """Bytes of weights in memory, activations aside: two models in float32, blocks with gradient and moments."""
        weights = sum(stored.numel for stored in self.checkpoint.tensors.values())
        trained = self.count * self.options.block**2 + sum(self.scales.values())
        return 4 * weights * (1 if self.against is None else 2) + 16 * trained


def make_plan(
    checkpoint: Checkpoint,
    options: TuneOptions,
    *,
    against: Checkpoint | None = None,
    text: tuple[str, str] | None = None,
    data: Path | None = None,
    whole: bool = False,
) -> TunePlan:
    """Check everything that can be checked before any work. text: (name, content). data: a jsonl file. whole: see
    `TunePlan`. Raises SwquantError."""
    _check_form(checkpoint, options, whole)
    if text is not None and data is not None:
        raise SwquantError("--text and --data are two texts to train on; give one of them")
    if against is None and text is None and data is None:
        raise SwquantError(
            "there is nothing to learn from; name the original with --against, or a text with --text or --data"
        )
    if against is not None:
        _check_vocabularies(checkpoint, against)
    window = min(options.window, context_of(checkpoint.config) or options.window)
    options = replace(options, window=window)
    given = None
    if text is not None:
        given = text_windows(checkpoint, text[1], window, text[0])
    elif data is not None:
        given = conversations(checkpoint, data, window)
    if given is not None:
        given.split()  # refuses what is too short
    pool, left_out = _pool(checkpoint, options)
    of_blocks = sum(math.prod(candidate.grid) for candidate in pool.values())
    weights, rounded = _weights(checkpoint)
    count = _count(options, weights, rounded, of_blocks) if options.trains_blocks else 0
    scales = _scales(checkpoint, pool, options.from_) if options.trains_scales else {}
    called = given.name if given else "own text"
    plan = TunePlan(
        checkpoint, against, options, given, called, pool, left_out, count, of_blocks, weights, rounded, scales, whole
    )
    if options.trains_blocks and plan.select == "recovery" and against is None:
        raise SwquantError("--select recovery weighs blocks by what rounding lost; name the original with --against")
    return plan


def _check_vocabularies(checkpoint: Checkpoint, against: Checkpoint) -> None:
    ours, theirs = (model.config.get_text_config().vocab_size for model in (checkpoint, against))
    if ours != theirs:
        raise SwquantError(
            f"{checkpoint.name} and {against.name} have different vocabularies ({ours} and {theirs} tokens); name the "
            "original with --against"
        )


def _check_form(checkpoint: Checkpoint, options: TuneOptions, whole: bool) -> None:
    """What an original has, and what a compressed checkpoint has."""
    if isinstance(checkpoint, CompressedCheckpoint):
        if "pool" in checkpoint.manifest:
            raise SwquantError(
                f"{checkpoint.name}: the sets of its pool fit it as it is; tune the checkpoint that the pool was made over"
            )
        if whole:
            raise SwquantError(
                f"--merge: {checkpoint.name} is compressed; tune it, then swquant merge bakes blocks into codes"
            )
        return
    if checkpoint.is_compressed or isinstance(checkpoint, PatchedCheckpoint):
        raise SwquantError(f"{checkpoint.name}: give a compressed checkpoint, or an original")
    if options.trains_scales:
        raise SwquantError(
            f"--train {options.train}: {checkpoint.name} is not compressed and has no scales; train blocks"
        )
    if options.select == "recovery":
        raise SwquantError(
            f"--select recovery: in {checkpoint.name} nothing was rounded; take gradient, or leave it out"
        )


def _weights(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many weights there are, and how many of them are rounded; of an original, those of all linear layers."""
    if isinstance(checkpoint, CompressedCheckpoint):
        totals = checkpoint.manifest["totals"]
        return totals["weights"], totals["quantized_weights"]
    linear = describe(checkpoint).weights
    every = {name: stored.numel for name, stored in checkpoint.tensors.items()}
    return sum(every.values()), sum(every[name] for name in linear)


def _rounded(checkpoint: Checkpoint) -> tuple[str, ...]:
    return checkpoint.quantized_names if isinstance(checkpoint, CompressedCheckpoint) else ()


def _pool(checkpoint: Checkpoint, options: TuneOptions) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Candidates, and rounded weights that are none and why."""
    empty = empty_model(checkpoint)
    architecture = describe(checkpoint, empty)
    weights = linear_names(architecture, empty)
    pool = candidates(checkpoint, weights, options.block, options.from_)
    reason = "an expert, or a layer with a product of its own"
    left_out = {name: reason for name in _rounded(checkpoint) or architecture.weights if name not in weights}
    if not pool:
        raise SwquantError(
            f"{checkpoint.name}: no linear layer to choose blocks from with --from {options.from_}; use all"
        )
    return pool, left_out


def _count(options: TuneOptions, weights: int, rounded: int, of_blocks: int) -> int:
    """How many blocks are trained."""
    count = options.parsed_budget.blocks(options.block, weights, rounded)
    if count < 1:
        raise SwquantError(
            f"--budget {options.budget} holds no block of {options.block} x {options.block} ({nbytes_of(1, options.block):,} "
            "bytes); give more, or a smaller --block"
        )
    return min(count, of_blocks)


def _scales(checkpoint: Checkpoint, pool: Mapping[str, Candidate], of: str) -> dict[str, int]:
    """Rounded weights of the pool, and how many scales and offsets each has."""
    scales = {}
    for name in _rounded(checkpoint):
        if name in pool:
            assert isinstance(checkpoint, CompressedCheckpoint)
            parts, _, _ = checkpoint.packed(name)
            scales[name] = sum(part.numel() for part in parts.values() if part.is_floating_point())
    if not scales:
        raise SwquantError(f"{checkpoint.name}: no rounded weight with scales to train with --from {of}; use all")
    return scales
