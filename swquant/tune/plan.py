"""The plan: how many blocks are trained, of which weights, on what text. What can be refused is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
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
    count, of_blocks: how many blocks are trained, and of how many. left_out: weights that cannot be patched -> why."""

    checkpoint: CompressedCheckpoint
    against: Checkpoint | None
    options: TuneOptions
    given: Corpus | None
    data: str
    pool: Mapping[str, Candidate]
    left_out: Mapping[str, str]
    count: int
    of_blocks: int

    @property
    def select(self) -> str:
        """By what blocks are chosen."""
        return self.options.select or ("recovery" if self.against is not None else "gradient")

    @property
    def nbytes(self) -> int:
        """What the blocks take in the sidecar."""
        return nbytes_of(self.count, self.options.block)

    @property
    def more_bits(self) -> float:
        """The same per rounded weight."""
        return 8 * self.nbytes / max(self.checkpoint.manifest["totals"]["quantized_weights"], 1)

    @property
    def tokens(self) -> int:
        """How many tokens the steps read."""
        return self.options.steps * self.options.batch * self.options.window

    @property
    def memory(self) -> int:
        """Bytes of weights in memory, activations aside: two models in float32, blocks with gradient and moments."""
        weights = sum(stored.numel for stored in self.checkpoint.tensors.values())
        return 4 * weights * (1 if self.against is None else 2) + 16 * self.count * self.options.block**2


def make_plan(
    checkpoint: Checkpoint,
    options: TuneOptions,
    *,
    against: Checkpoint | None = None,
    text: tuple[str, str] | None = None,
    data: Path | None = None,
) -> TunePlan:
    """Check everything that can be checked before any work. text: (name, content). data: a jsonl file. Raises
    SwquantError."""
    if not isinstance(checkpoint, CompressedCheckpoint):
        raise SwquantError(
            f"{checkpoint.name}: not a compressed checkpoint; blocks are laid over one: swquant compress MODEL OUT"
        )
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
    pool, left_out, of_blocks, count = _blocks(checkpoint, options)
    plan = TunePlan(
        checkpoint, against, options, given, given.name if given else "own text", pool, left_out, count, of_blocks
    )
    if plan.select == "recovery" and against is None:
        raise SwquantError("--select recovery weighs blocks by what rounding lost; name the original with --against")
    return plan


def _check_vocabularies(checkpoint: Checkpoint, against: Checkpoint) -> None:
    ours, theirs = (model.config.get_text_config().vocab_size for model in (checkpoint, against))
    if ours != theirs:
        raise SwquantError(
            f"{checkpoint.name} and {against.name} have different vocabularies ({ours} and {theirs} tokens); name the "
            "original with --against"
        )


def _blocks(
    checkpoint: CompressedCheckpoint, options: TuneOptions
) -> tuple[dict[str, Candidate], dict[str, str], int, int]:
    """Candidates, rounded weights that are none and why, how many blocks there are, and how many are trained."""
    empty = empty_model(checkpoint)
    architecture = describe(checkpoint, empty)
    weights = linear_names(architecture, empty)
    pool = candidates(checkpoint, weights, options.block, options.from_)
    reason = "an expert, or a layer with a product of its own"
    left_out = {name: reason for name in checkpoint.quantized_names if name not in weights}
    if not pool:
        raise SwquantError(
            f"{checkpoint.name}: no linear layer to choose blocks from with --from {options.from_}; use all"
        )
    of_blocks = sum(math.prod(candidate.grid) for candidate in pool.values())
    totals = checkpoint.manifest["totals"]
    count = options.parsed_budget.blocks(options.block, totals["weights"], totals["quantized_weights"])
    if count < 1:
        raise SwquantError(
            f"--budget {options.budget} holds no block of {options.block} x {options.block} ({nbytes_of(1, options.block):,} "
            "bytes); give more, or a smaller --block"
        )
    return pool, left_out, of_blocks, min(count, of_blocks)
