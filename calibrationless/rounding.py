"""Round-to-nearest: choose a scale for every block, round every weight.

    choose   symmetric    scale = signed_max / -2^(bits-1)        the block's extreme is exact
             asymmetric   scale = (max - min) / (2^bits - 1)      zero_point = round(-min / scale)
    round    codes = clamp(round(w / scale) + zero_point)

"Signed maximum" means that the weight of largest magnitude, whatever its sign, takes the one code
that has no mirror image (-8 at 4 bits), so a scale may be negative. ONNX Runtime and GGUF's Q4_0 do
the same; it is half a step better than |max| / 7.5 and it is what lets a block hold a super weight
exactly for a loader that knows nothing of sidecars.

The scale is rounded to its storage dtype *before* the codes are computed, so what a loader reads back is
what was minimized. Weights stream through in pieces that fit the processor's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calibrationless.blocks import Block, Tile, from_blocks, scale_shape, shape_of, to_blocks
from calibrationless.clipping import Clip, clip_threshold
from calibrationless.loops import cut_codes, run_loop
from calibrationless.pieces import PIECE, for_pieces
from calibrationless.quantized import QuantizedTensor, check_bits
from calibrationless.search import block_importance, search_scale

__all__ = ["choose_scale", "quantize", "round_to_codes"]

# Compiled loops go through a piece twice, whatever its size; what is left of torch takes as long for fewer blocks.
_PIECE = 2 * PIECE
_NOT_FINITE = "a weight is NaN or infinite"


def choose_scale(
    blocks: Tensor,
    bits: int,
    *,
    symmetric: bool,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    first: int = 0,
    keep_extreme: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale [blocks, 1] of `dtype` and zero point uint8 [blocks, 1] (None if symmetric).

    blocks: float32 [blocks, elements]. A block of zeros gets scale 1, so that no division by zero
    ever happens and it decodes to zeros. importance, first: search instead of stretching to the extremes
    (see `search_scale`), but for the blocks of `keep_extreme`, bool [blocks].
    Raises ValueError where a weight is NaN or infinite, or where the scale does not fit `dtype`.
    """
    low, high = (torch.empty(len(blocks), 1, device=blocks.device) for _ in range(2))
    run_loop("block_extremes", blocks.device, blocks.contiguous(), low.view(-1), high.view(-1))
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        wide = torch.where(high >= -low, high, low) / -half
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        wide = (high - low) / top
    zero_point = None
    if importance is not None and _finite(wide):
        searched, zero_point = search_scale(blocks, importance, first, bits, symmetric=symmetric)
        wide = searched if keep_extreme is None else torch.where(keep_extreme.unsqueeze(1), wide, searched)
    scale = wide.to(dtype)
    if not _finite(scale):
        if _finite(wide):
            raise ValueError(f"a scale of {wide.abs().max():.3g} does not fit {str(dtype).removeprefix('torch.')}")
        raise ValueError(_NOT_FINITE)
    scale = scale.masked_fill(scale == 0, 1)
    if symmetric:
        _check_decodes(scale.abs().amax(dim=0) * half, low, high)
        return scale, None
    plain = torch.round(-low / scale.to(torch.float32))
    if zero_point is None:
        zero_point = plain
    elif keep_extreme is not None:
        zero_point = torch.where(keep_extreme.unsqueeze(1), plain, zero_point)
    stored = zero_point.clamp_(0, top).to(torch.uint8)
    _check_decodes(scale * stored, low, high)
    _check_decodes(scale * (top - stored), low, high)
    return scale, stored


def _finite(values: Tensor) -> bool:
    """Whether all are. Two passes, where torch.isfinite takes five."""
    return math.isfinite(float(values.abs().max()))


def _check_decodes(extreme: Tensor, low: Tensor, high: Tensor) -> None:
    """Refuse finite weights whose decoded value would overflow: a scale can fit a dtype that its multiples do not."""
    if not _finite(extreme):
        name = str(extreme.dtype).removeprefix("torch.")
        largest = max(float(high.max()), -float(low.min()))
        raise ValueError(f"a weight of {largest:.3g} does not fit {name}")


def round_to_codes(
    blocks: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, out: Tensor | None = None
) -> Tensor:
    """uint8 codes [blocks, elements]; ties go to the even code, as everywhere in torch.

    blocks: float32 [blocks, elements]; scale, zero_point: [blocks, 1]. out: where the codes go.
    """
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device) if out is None else out
    steps = scale.to(torch.float32).flatten()
    middle = torch.full_like(steps, 1 << (bits - 1)) if zero_point is None else zero_point.to(torch.float32).flatten()
    cut_codes(blocks, steps, torch.zeros_like(steps), middle, bits, codes)
    return codes


def quantize(
    weight: Tensor,
    block: Block,
    bits: int,
    *,
    symmetric: bool = True,
    clip: Clip | None = None,
    importance: Tensor | None = None,
    keep_extreme: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """Round a [out, in] weight to `bits` per element.

    clip: cut each block's outliers first. importance: float [in], how much an error on each input channel matters
    (its energy); with it, scales are searched. keep_extreme: bool [blocks], blocks that are neither clipped nor
    searched, because they must represent a super weight. scale_dtype: the dtype that the scale is stored in,
    the weight's own by default.
    Raises ValueError for bits outside 2..8, a block that does not divide the shape, NaN or Inf.
    """
    check_bits(bits)
    shape = shape_of(weight)
    dtype = scale_dtype or weight.dtype
    blocks = to_blocks(weight.detach(), block)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    pattern = None if importance is None else block_importance(importance, block, shape)

    def work(piece: slice) -> tuple[Tensor, Tensor | None]:
        part = blocks[piece].to(torch.float32).contiguous()
        if clip is not None:
            if not bool(torch.isfinite(part).all()):  # a clipped Inf would pass for an ordinary weight
                raise ValueError(_NOT_FINITE)
            threshold = clip_threshold(part, clip)
            if keep_extreme is not None:
                threshold = threshold.masked_fill(keep_extreme[piece].unsqueeze(1), torch.inf)
            part = part.clamp(-threshold, threshold)
        scale, zero_point = choose_scale(
            part,
            bits,
            symmetric=symmetric,
            dtype=dtype,
            importance=pattern,
            first=piece.start,
            keep_extreme=None if keep_extreme is None else keep_extreme[piece],
        )
        round_to_codes(part, scale, zero_point, bits, out=codes[piece])
        return scale, zero_point

    scales, zero_points = zip(*for_pieces(work, *blocks.shape, device=blocks.device, piece=_PIECE), strict=True)
    stored = scale_shape(block, shape)
    return QuantizedTensor(
        codes=from_blocks(codes, block, shape) if isinstance(block, Tile) else codes.view(shape),
        scale=torch.cat(scales).reshape(stored),
        zero_point=None if symmetric else torch.cat(zero_points).reshape(stored),
        block=block,
        bits=bits,
    )
