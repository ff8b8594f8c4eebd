"""Codes on a line of their own: `weight = scale * code + offset`, where the offset is any number.

An integer zero point shifts a grid by whole steps. A real offset is a second free number per block, and with two of
them the one or two weights that matter most in a block come out nearly exactly: where the energy of the inputs is
uneven, the divergence of the model is half of what it is with integers, at the same bits (docs/quality.md).

    search   stretches and shifts of the codes; for given codes, scale and offset are a weighted least-squares line,
             which needs three sums; the best line is refitted to its own codes
    settle   both to what is stored: floats of 16 bits, or a byte each (`Compact`), the codes cut anew
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibrationless.blocks import Block, Tile, from_blocks, scale_shape, shape_of, to_blocks
from calibrationless.loops import cut_codes, run_loop
from calibrationless.pieces import for_pieces
from calibrationless.quantized import OCTAVE, Compact, QuantizedTensor, check_bits, compact_steps
from calibrationless.search import block_importance

__all__ = ["quantize_affine", "search_affine"]

STRETCHES = tuple(0.9 + 0.06 * i for i in range(10))
SHIFTS = (-0.33, 0.0, 0.33)
_REFITS = 4
_AROUND = 2


def quantize_affine(
    weight: Tensor,
    block: Block,
    bits: int,
    *,
    importance: Tensor | None = None,
    keep_extreme: Tensor | None = None,
    storage: torch.dtype | None = torch.float16,
) -> QuantizedTensor:
    """Round a [out, in] weight to codes with a real offset.

    importance: float [in], how much an error on each input channel matters; all alike if None. keep_extreme: bool
    [blocks], blocks whose line spans their range, because they must represent a super weight. storage: the dtype that
    scale and offset are stored in; None for a byte each (`QuantizedTensor.compact` then holds them), which takes a
    block that lies within a row. Raises ValueError for NaN, infinity, and scales that their storage cannot hold.
    """
    check_bits(bits)
    shape = shape_of(weight)
    blocks = to_blocks(weight.detach(), block)
    if storage is None and (isinstance(block, Tile) or shape[1] % blocks.shape[1]):
        raise ValueError(f"block {block} reaches over rows, and a byte per scale is relative to its row; use a group")
    pattern = block_importance(
        torch.ones(shape[1], device=blocks.device) if importance is None else importance, block, shape
    )
    scale, offset = _lines(blocks, pattern, bits, keep_extreme)
    form, compact = scale_shape(block, shape), None
    if storage is None:
        bytes_of = _settled_in_bytes(blocks, pattern, bits, shape[0], scale, offset)
        compact = Compact(bytes_of.rows, bytes_of.exponents.reshape(form), bytes_of.zeros.reshape(form))
    else:
        _settled_in(storage, scale, offset)
    scale.masked_fill_(scale == 0, 1.0)  # the block is constant, or its scale too small to store: codes of 0
    codes, dtype = _cut(blocks, bits, scale, offset), storage or torch.float32
    return QuantizedTensor(
        codes=from_blocks(codes, block, shape) if isinstance(block, Tile) else codes.view(shape),
        scale=scale.reshape(form).to(dtype),
        zero_point=None,
        block=block,
        bits=bits,
        offset=offset.reshape(form).to(dtype),
        compact=compact,
    )


def _lines(blocks: Tensor, pattern: Tensor, bits: int, keep_extreme: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and offset of every block, float32 [blocks]."""
    scale, offset = (torch.empty(len(blocks), device=blocks.device) for _ in range(2))

    def search(piece: slice) -> None:
        part = blocks[piece].to(torch.float32).contiguous()
        if not bool(torch.isfinite(part).all()):
            raise ValueError("a weight is NaN or infinite")
        _search(part, pattern, piece.start, bits, scale[piece], offset[piece])
        if keep_extreme is not None:
            low, high = part.amin(dim=1), part.amax(dim=1)
            scale[piece] = torch.where(keep_extreme[piece], (high - low) / ((1 << bits) - 1), scale[piece])
            offset[piece] = torch.where(keep_extreme[piece], low, offset[piece])

    for_pieces(search, *blocks.shape, device=blocks.device)
    return scale, offset


def _cut(blocks: Tensor, bits: int, scale: Tensor, offset: Tensor) -> Tensor:
    """uint8 codes like blocks: the nearest on every block's line."""
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)

    def cut(piece: slice) -> None:
        steps = scale[piece]
        cut_codes(blocks[piece].to(torch.float32), steps, offset[piece], torch.zeros_like(steps), bits, codes[piece])

    for_pieces(cut, *blocks.shape, device=blocks.device)
    return codes


def search_affine(blocks: Tensor, importance: Tensor, first: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset float32 [blocks] of least weighted error, not yet brought to what is stored.

    blocks: float32 [blocks, elements], contiguous and finite. importance: from `block_importance`. first: index of
    blocks[0] among all blocks of the weight.
    """
    scale, offset = (torch.empty(len(blocks), device=blocks.device) for _ in range(2))
    _search(blocks, importance, first, bits, scale, offset)
    return scale, offset


def _search(part: Tensor, pattern: Tensor, first: int, bits: int, scale: Tensor, offset: Tensor) -> None:
    candidates = (torch.tensor(STRETCHES), torch.tensor(SHIFTS))
    run_loop("search_lines", part.device, part, pattern, first, *candidates, 1 << bits, _REFITS, scale, offset)


def _settled_in(dtype: torch.dtype, scale: Tensor, offset: Tensor) -> None:
    """Round both in place. The offset is what the code 0 stands for: rounded, it moves all weights of the block
    alike."""
    for values in (scale, offset):
        stored = values.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(f"a scale of {values.abs().max():.3g} does not fit {str(dtype).removeprefix('torch.')}")
        values.copy_(stored)


def _reach_zero(scale: Tensor, offset: Tensor, top: float) -> None:
    """Stretch lines that do not pass zero until they do, in place: a byte for the offset counts steps below zero."""
    high = offset + top * scale
    above, below = offset > 0, high < 0
    scale.copy_(torch.where(above, high / top, torch.where(below, -offset / top, scale)))
    offset.masked_fill_(above, 0.0)


def _settled_in_bytes(blocks: Tensor, pattern: Tensor, bits: int, rows: int, scale: Tensor, offset: Tensor) -> Compact:
    """Both in place, and the bytes that stand for them."""
    per_row = len(blocks) // rows
    _reach_zero(scale, offset, float((1 << bits) - 1))
    largest = scale.view(rows, per_row).amax(dim=1)
    of_rows = largest.to(torch.float16)
    if odd := largest[~torch.isfinite(of_rows) | ((of_rows == 0) & (largest > 0))].tolist():
        raise ValueError(f"a scale of {odd[0]:.3g} does not fit float16")
    exponents, zeros = (torch.empty(len(blocks), dtype=torch.uint8, device=blocks.device) for _ in range(2))
    steps, wide = compact_steps().to(blocks.device), of_rows.to(torch.float32)

    def settle(piece: slice) -> None:
        part = blocks[piece].to(torch.float32).contiguous()
        out = (values[piece] for values in (scale, offset, exponents, zeros))
        numbers = (piece.start, 1 << bits, _AROUND, OCTAVE)
        run_loop("settle_lines", part.device, part, pattern, *numbers, steps, wide, per_row, *out)

    for_pieces(settle, *blocks.shape, device=blocks.device)
    return Compact(of_rows, exponents, zeros)
