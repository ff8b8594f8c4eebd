"""Which blocks are trained: the best of all layers together, by a score of every block of the grid.

    gradient   mean |G| of the block, G the gradient of the weight summed over the warm-up: Sparse Matrix Tuning
               (arXiv:2405.15525). One float32 gradient of every candidate is held while it is summed
    fisher     sum over tokens of |g[t, R]|^2 |x[t, C]|^2: the trace of the block's per-token Fisher information, from
               two small matrices of block norms. No dense gradient, and it works on packed weights
    recovery   fisher times |W' - W|^2 of the block: to second order, what undoing its rounding would win back
    random     any blocks: the control
    diagonal   the blocks that lie on the diagonal, any of them where not all fit: the control that DiaBlo is

The warm-up moves no parameter; it only looks. What is looked at is the loss that will be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import Blocks
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.architecture import LinearWeight
from swquant.parallel import world

__all__ = ["Candidate", "candidates", "chosen", "named", "scores"]

_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A weight that blocks can be chosen from. shape: as it is stored. grid: how many blocks it has each way."""

    name: str
    weight: LinearWeight
    shape: tuple[int, int]
    side: int

    @property
    def grid(self) -> tuple[int, int]:
        return (-(-self.shape[0] // self.side), -(-self.shape[1] // self.side))

    @property
    def attention(self) -> bool:
        """Whether it belongs to an attention, by the name of its module."""
        return bool(_ATTENTION.search(self.weight.module.rpartition(".")[0]))


def candidates(
    checkpoint: Checkpoint, weights: Mapping[str, LinearWeight], side: int, pool: str
) -> dict[str, Candidate]:
    """Stored name -> candidate. pool: attention, mlp or all."""
    found = {}
    for name, weight in weights.items():
        rows, cols = checkpoint.tensors[name].shape
        candidate = Candidate(name, weight, (rows, cols), side)
        if pool == "all" or candidate.attention == (pool == "attention"):
            found[name] = candidate
    return found


def scores(
    select: str,
    pool: Mapping[str, Candidate],
    model: PreTrainedModel,
    losses: Iterable[Callable[[], Tensor]],
    *,
    checkpoint: Checkpoint,
    against: Checkpoint | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Stored name -> float32 score of every block, [block rows, block columns] of the stored weight; less than 0 where
    a block is out of the question. losses: make the loss of a batch each, when they are called; of processes that train
    together each gives its own, and the scores are those of all. Raises SwquantError."""
    if select in ("random", "diagonal"):
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: torch.rand(candidate.grid, generator=generator) for name, candidate in pool.items()}
        if select == "random":
            return drawn
        return {name: torch.where(_diagonal(score.shape), score, -1.0) for name, score in drawn.items()}
    found = _watched(pool, model, losses, dense=select == "gradient")
    if select == "recovery":
        if against is None:
            raise SwquantError(
                "--select recovery weighs blocks by what rounding lost; name the original with --against"
            )
        found = {name: score * _lost(pool[name], checkpoint, against) for name, score in found.items()}
    if not any(bool(score.any()) for score in found.values()):
        raise SwquantError("no block has a gradient: the loss is zero already, there is nothing to train")
    return found


def chosen(score: Mapping[str, Tensor], pool: Mapping[str, Candidate], count: int) -> dict[str, Blocks]:
    """The `count` best blocks of all weights together, as zeros, by stored name; ties go to the earlier one."""
    flat = torch.cat([item.flatten() for item in score.values()])
    count = min(count, int((flat >= 0).sum()))
    best = flat.argsort(descending=True, stable=True)[:count].sort().values
    blocks, start = {}, 0
    for name, item in score.items():
        inside = best[(best >= start) & (best < start + item.numel())] - start
        start += item.numel()
        if len(inside):
            side, width = pool[name].side, item.shape[1]
            rows, cols = (inside // width).to(torch.int32), (inside % width).to(torch.int32)
            blocks[name] = Blocks(rows, cols, torch.zeros(len(inside), side, side))
    return blocks


def named(blocks: Mapping[str, Blocks]) -> dict[str, Tensor]:
    """Where blocks lie, as a state keeps it: rows/NAME and cols/NAME, int32 [n]."""
    return {f"{part}/{name}": getattr(item, part) for part in ("rows", "cols") for name, item in blocks.items()}


def _diagonal(grid: tuple[int, ...]) -> Tensor:
    """bool [grid]: the blocks that the diagonal of the weight goes through, one for every row and column of the longer
    side."""
    rows, cols = grid
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    along = torch.arange(max(rows, cols))
    mask[along * rows // max(rows, cols), along * cols // max(rows, cols)] = True
    return mask


def _blocked(x: Tensor, side: int) -> Tensor:
    """[tokens, size] -> [tokens, blocks]: sums of squares."""
    squares = x.to(torch.float32).square()
    squares = torch.nn.functional.pad(squares, (0, -x.shape[1] % side))
    return squares.unflatten(1, (-1, side)).sum(dim=2)


def _watched(
    pool: Mapping[str, Candidate], model: PreTrainedModel, losses: Iterable[Callable[[], Tensor]], *, dense: bool
) -> dict[str, Tensor]:
    """Scores from gradients of the outputs and the inputs of every candidate. dense: mean |sum of the gradients|."""
    sums: dict[str, Tensor] = {}

    def watch(candidate: Candidate) -> Callable[..., None]:
        def forward(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            seen = x if dense else _blocked(x, candidate.side)

            def backward(g: Tensor) -> None:
                g = g.detach().flatten(0, -2)
                product = (g if dense else _blocked(g, candidate.side)).to(torch.float32).T @ seen.to(torch.float32)
                sums[candidate.name] = sums[candidate.name].add_(product) if candidate.name in sums else product

            output.register_hook(backward)

        return forward

    with ExitStack() as stack:
        # Nothing is trainable yet, so the graph has to begin at the embedding.
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(lambda _, __, output: output.requires_grad_()).remove)
        for candidate in pool.values():
            module = model.get_submodule(candidate.weight.module)
            stack.callback(module.register_forward_hook(watch(candidate)).remove)
        for loss in losses:
            loss().backward()
    found = {}
    for name, candidate in pool.items():
        if name not in sums:  # no token came by
            shape = candidate.shape if dense else candidate.grid
            sums[name] = torch.zeros(shape[::-1] if candidate.weight.transposed else shape, device=model.device)
        item = sums.pop(name)
        world().sum_([item])
        if dense:
            item = _block_sums(item.abs_(), candidate.side) / candidate.side**2
        found[name] = (item.T if candidate.weight.transposed else item).cpu()
    return found


def _block_sums(weight: Tensor, side: int) -> Tensor:
    """[rows, cols] -> sums over the blocks of its grid."""
    wide = torch.nn.functional.pad(weight, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
    return wide.unflatten(1, (-1, side)).unflatten(0, (-1, side)).sum(dim=(1, 3))


def _lost(candidate: Candidate, checkpoint: Checkpoint, against: Checkpoint) -> Tensor:
    """|W' - W|^2 of every block."""
    name = candidate.name
    if name not in against.tensors or against.tensors[name].shape != candidate.shape:
        raise SwquantError(
            f"{against.name}: has no {name} of {list(candidate.shape)}; name the original that was compressed"
        )
    ours, original = checkpoint.read(name).to(torch.float32), against.read(name).to(torch.float32)
    if isinstance(checkpoint, CompressedCheckpoint) and checkpoint.manifest["tensors"][name].get("scaled"):
        # Whole columns were multiplied by powers of two, which their norms tell.
        ratio = ours.norm(dim=0) / original.norm(dim=0).clamp_min(1e-30)
        original *= torch.exp2(torch.log2(ratio.clamp_min(1e-30)).round())
    return _block_sums((ours - original).square_(), candidate.side)
