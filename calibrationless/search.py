"""The scale search: of many scales for a block, the one whose rounding error matters least.

Plain rounding stretches the codes from a block's one extreme to the other. A smaller step that cuts the extreme a
little often costs less, and "costs" depends on the input channel that a weight multiplies:

    minimize over scale, zero point:   sum_j importance[j] * (w[j] - scale * (codes[j] - zero_point))^2

With importance = the energy of input channel j on the one prompt (its mean share of a token's square, see `probe`),
this is the expected error of the layer's output for uncorrelated inputs. Without it a search *hurts* large blocks: it
gives up the few weights that matter.

For given codes the best scale is a ratio of two sums (least squares), so a trial needs no more than those: 16 stretches
of plain rounding's scale are tried, the best is refitted to its own codes. That is the search of GGUF's k-quants, made
signed: a symmetric scale may be negative, so either extreme of the block can take the code without a mirror image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibrationless.blocks import Block, Tile, block_elements, to_blocks
from calibrationless.loops import run_loop

__all__ = ["STRETCHES", "block_importance", "search_scale"]

# Inverse scales tried, as factors of plain rounding's: from a little coarser to cutting a third of the range.
STRETCHES = tuple(0.9 + 0.04 * i for i in range(16))
_SHIFTS = 1  # zero points tried on each side of the one that centers the range
_REFITS = 2


def block_importance(importance: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Importance of each weight in its block: [in] -> float32 [period, elements]; block b has row b % period.

    Blocks repeat their columns after a while: a group after each row, a channel at once. Zeros are lifted to a
    millionth of the mean, so that weights whose inputs were silent on the prompt are still rounded, not given up.
    """
    in_features = shape[1]
    h = importance.detach().to(torch.float32)
    if h.shape != (in_features,) or not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
        raise ValueError(f"importance must be {in_features} finite numbers from 0, one for each input channel")
    mean = float(h.double().mean())
    h = torch.ones_like(h) if mean == 0 else (h / mean).clamp_(min=1e-6)
    rows = block.rows if isinstance(block, Tile) else math.lcm(in_features, block_elements(block, shape)) // in_features
    return to_blocks(h.expand(rows, in_features), block).contiguous()


def search_scale(
    blocks: Tensor, importance: Tensor, first: int, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Wide scale float32 [blocks, 1] and zero point float32 [blocks, 1] (None if symmetric) of least weighted error.

    blocks: float32 [blocks, elements], finite. importance: from `block_importance`. first: index of blocks[0] among all
    blocks of the weight. A block of zeros gets scale 0.
    """
    count = blocks.shape[0]
    if importance.shape[1] != blocks.shape[1]:
        raise ValueError(f"importance has {importance.shape[1]} weights for blocks of {blocks.shape[1]}")
    scale, zero_point = (torch.empty(count, 1, device=blocks.device) for _ in range(2))
    run_loop(
        "search_blocks",
        blocks.device,
        blocks.contiguous(),
        importance,
        first,
        torch.tensor(STRETCHES, dtype=torch.float32),
        1 << bits,
        _SHIFTS,
        symmetric,
        _REFITS,
        scale[:, 0],
        zero_point[:, 0],
    )
    return scale, None if symmetric else zero_point
