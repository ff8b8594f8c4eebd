"""Super-blocks: the k-quants of GGUF, where 256 weights share what their blocks' scales are counted in.

    Q4_K, Q5_K    blocks of 32     weight = step * scales[block] * code - low * mins[block]       6-bit integers
    Q6_K          blocks of 16     weight = step * scales[block] * (code - 32)                    8-bit integers

A scale in 6 bits instead of 16 is worth half a bit per weight. Each block is searched by itself as in `affine` and
`search`, with the energy of the prompt; then the integers and the two floats of its super-block are settled in turn,
always by least weighted error of the result, so that what is minimized is what the file will hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.affine import search_affine
from calibrationless.blocks import Group, shape_of
from calibrationless.loops import cut_codes, run_loop
from calibrationless.pieces import for_pieces
from calibrationless.quantized import QuantizedTensor, SuperBlocks
from calibrationless.search import block_importance, search_scale

__all__ = ["SUPER_BLOCK", "SUPER_KINDS", "SuperKind", "quantize_super_blocks"]

SUPER_BLOCK = 256  # weights
STRETCHES = (1.0, 0.96, 1.04)
_ROUNDS = 2
SMALLEST = 2.0**-24  # of float16
# Times that a super weight counts in its super-block beside its own importance: it comes out nearly exact.
_INSISTENCE = 1e4


@dataclass(frozen=True)
class SuperKind:
    """block: weights that share an integer scale. limit: the largest of these. offsets: whether blocks have them."""

    block: int
    limit: int
    offsets: bool


# bits -> the kind
SUPER_KINDS = {4: SuperKind(32, 63, True), 5: SuperKind(32, 63, True), 6: SuperKind(16, 127, False)}


def quantize_super_blocks(
    weight: Tensor, bits: int, *, importance: Tensor | None = None, super_weights: Sequence[tuple[int, int]] = ()
) -> QuantizedTensor:
    """Round a [out, in] weight, `in` a multiple of 256, to 4, 5 or 6 bits; the result has `super_blocks`.

    importance: float [in], how much an error on each input channel matters; all alike if None. super_weights: (row,
    col) of weights that must be represented. Scale and offset of the result are float32 and exactly what the integers
    stand for. Raises ValueError for other shapes and bits, NaN, infinity, and scales that float16 cannot hold.
    """
    shape, kind = shape_of(weight), SUPER_KINDS.get(bits)
    if kind is None:
        raise ValueError(f"super-blocks of {bits} bits do not exist; use {', '.join(map(str, SUPER_KINDS))}")
    if shape[1] % SUPER_BLOCK:
        raise ValueError(f"in_features {shape[1]} is not a multiple of {SUPER_BLOCK}, the weights of a super-block")
    heavy = torch.ones(shape[1], device=weight.device) if importance is None else importance
    pattern = block_importance(heavy, Group(SUPER_BLOCK), shape)
    blocks = weight.detach().reshape(-1, SUPER_BLOCK)
    found = _Found.empty(len(blocks), SUPER_BLOCK // kind.block, weight.device)

    def settle(piece: slice) -> None:
        _settled(blocks[piece], pattern, piece.start, bits, kind, found.of(piece))

    for_pieces(settle, *blocks.shape, device=weight.device)
    _insist(blocks, pattern, bits, kind, shape, super_weights, found)
    return _assembled(blocks, shape, bits, kind, found)


@dataclass(frozen=True)
class _Found:
    """Units of super-blocks float32 [supers], integers of their blocks int16 and uint8 [supers, blocks]."""

    units: Tensor
    unit_lows: Tensor
    scales: Tensor
    mins: Tensor

    @classmethod
    def empty(cls, supers: int, blocks: int, device: torch.device) -> _Found:
        integers = torch.zeros(supers, blocks, dtype=torch.int16, device=device)
        units = torch.zeros(supers, device=device)
        return cls(units, units.clone(), integers, integers.to(torch.uint8))

    def of(self, piece: slice) -> _Found:
        return _Found(self.units[piece], self.unit_lows[piece], self.scales[piece], self.mins[piece])


def _settled(blocks: Tensor, pattern: Tensor, first: int, bits: int, kind: SuperKind, found: _Found) -> None:
    """Search some super-blocks, from `first` on; the result goes to `found`."""
    part = blocks.to(torch.float32).contiguous()
    if not bool(torch.isfinite(part).all()):
        raise ValueError("a weight is NaN or infinite")
    small, per = part.view(-1, kind.block), SUPER_BLOCK // kind.block
    fine = pattern.view(-1, kind.block)
    if kind.offsets:
        scale, offset = search_affine(small, fine, first * per, bits)
        top = float((1 << bits) - 1)
        scale = torch.where(offset > 0, scale + offset / top, scale)  # an offset is at most zero: the line turns there
        offset.clamp_(max=0.0)
    else:
        scale = search_scale(small, fine, first * per, bits, symmetric=True)[0]
        offset = torch.zeros_like(scale)
    run_loop(
        "settle_super_blocks",
        part.device,
        part,
        pattern,
        first,
        1 << bits,
        not kind.offsets,
        kind.limit,
        torch.tensor(STRETCHES),
        _ROUNDS,
        scale.view(-1, per),
        offset.view(-1, per),
        found.units,
        found.unit_lows,
        found.scales,
        found.mins,
    )


def _insist(
    blocks: Tensor,
    pattern: Tensor,
    bits: int,
    kind: SuperKind,
    shape: tuple[int, int],
    super_weights: Sequence[tuple[int, int]],
    found: _Found,
) -> None:
    """Search the super-blocks of super weights again, these weights counting for more than all others."""
    places: dict[int, list[int]] = {}
    for row, col in super_weights:
        index, inside = divmod(row * shape[1] + col, SUPER_BLOCK)
        places.setdefault(index, []).append(inside)
    for index, columns in places.items():
        own = pattern[index % len(pattern)].clone()
        own[torch.tensor(columns)] = own.max() * _INSISTENCE
        piece = slice(index, index + 1)
        _settled(blocks[piece], own.unsqueeze(0), 0, bits, kind, found.of(piece))


def _assembled(blocks: Tensor, shape: tuple[int, int], bits: int, kind: SuperKind, found: _Found) -> QuantizedTensor:
    """Codes cut with what was found, and all of it in the form of the weight."""
    if bool((found.units.abs() >= 65504).any() | (found.unit_lows.abs() >= 65504).any()):
        raise ValueError("a scale does not fit float16")
    found.units.masked_fill_(found.units == 0, SMALLEST)  # no scale is zero: feedback divides by them, and a step that
    found.scales.masked_fill_(found.scales == 0, 1)  # is there costs nothing
    scale = found.units.unsqueeze(1) * found.scales.to(torch.float32)
    offset = -found.unit_lows.unsqueeze(1) * found.mins.to(torch.float32) if kind.offsets else torch.zeros_like(scale)
    form = (len(blocks), SUPER_BLOCK // kind.block, kind.block)
    codes = torch.empty(form, dtype=torch.uint8, device=blocks.device)
    middle = 0 if kind.offsets else 1 << (bits - 1)

    def cut(piece: slice) -> None:
        part = blocks[piece].to(torch.float32).reshape(-1, kind.block)
        steps, low = scale[piece].flatten(), offset[piece].flatten()
        cut_codes(part, steps, low, torch.full_like(steps, middle), bits, codes[piece].view_as(part))

    for_pieces(cut, *blocks.shape, device=blocks.device)
    of_block, of_super = (shape[0], shape[1] // kind.block), (shape[0], shape[1] // SUPER_BLOCK)
    parts = SuperBlocks(
        steps=found.units.to(torch.float16).view(of_super),
        scales=found.scales.view(of_block),
        lows=found.unit_lows.to(torch.float16).view(of_super) if kind.offsets else None,
        mins=found.mins.view(of_block) if kind.offsets else None,
    )
    return QuantizedTensor(
        codes=codes.view(shape),
        scale=scale.view(of_block),
        zero_point=None,
        block=Group(kind.block),
        bits=bits,
        offset=offset.view(of_block) if kind.offsets else None,
        super_blocks=parts,
    )
