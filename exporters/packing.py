"""Packing codes of 2 to 8 bits into words, without a loop over bits.

Layout (compressed-tensors `pack-quantized`, and every little-endian bit stream): code i of a row
occupies bits [i*b, (i+1)*b) of that row, lowest bit first, stored as int32 words; a row is padded with
zeros to whole words.

Eight b-bit codes always make exactly b bytes, so one 64-bit lane holds a whole unit of work: eight codes
enter as eight bytes, three mask-and-shift steps close the gaps between them, and the low b bytes are
the result. The same steps backwards unpack. Measured beside compressed-tensors' own packer in
`benchmarks/weight_pass.py`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from calibrationless import check_bits, for_pieces

__all__ = ["pack", "packed_words", "unpack"]

if sys.byteorder != "little":  # pragma: no cover - every byte below is laid out for little-endian words
    raise ImportError("exporters.packing needs a little-endian machine")


def packed_words(count: int, bits: int) -> int:
    """int32 words that `count` codes of `bits` take."""
    return -(-count * bits // 32)


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """(lane width, mask of the low half's payload, shift that closes the gap) of the three merges."""
    steps = []
    for level in range(3):
        half = 8 << level  # 8, 16, 32 bits: the two neighbours to be merged
        payload = (1 << (bits << level)) - 1
        mask = sum(payload << start for start in range(0, 64, 2 * half))
        steps.append((half, mask - (1 << 64) if mask >> 63 else mask, half - (bits << level)))
    return steps


def _close_gaps(lanes: Tensor, bits: int) -> Tensor:
    """int64 lanes of eight bytes -> lanes whose low 8*bits bits hold the eight codes."""
    for half, mask, gap in _steps(bits):
        low = lanes & mask
        lanes = low.bitwise_or_((lanes >> gap) & (mask << (half - gap)))
    return lanes


def _open_gaps(lanes: Tensor, bits: int) -> Tensor:
    for half, mask, gap in reversed(_steps(bits)):
        low = lanes & mask
        lanes = low.bitwise_or_((lanes << gap) & (mask << half))
    return lanes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, cols], each below 2^bits -> int32 [rows, ceil(cols * bits / 32)].

    Raises ValueError for another dtype or rank. Codes of 2^bits or more are the caller's bug: they are
    not checked here.
    """
    check_bits(bits)
    if codes.dtype is not torch.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [rows, cols], got {codes.dtype} {list(codes.shape)}")
    rows, cols = codes.shape
    words = packed_words(cols, bits)
    packed = torch.empty(rows, words, dtype=torch.int32)

    def work(piece: slice) -> None:
        part = codes[piece]
        if cols % 32:
            part = torch.nn.functional.pad(part, (0, -cols % 32))
        stream = _packed_bytes(_flat(part, 8), bits)
        packed[piece] = stream.view(torch.int32).view(len(part), -1)[:, :words]

    for_pieces(work, rows, cols)
    return packed


def _flat(matrix: Tensor, width: int) -> Tensor:
    """The elements in one dimension that can be viewed as wider ones: torch refuses odd strides, which it keeps for
    dimensions of length 1, and memory that does not begin at a multiple of `width` elements."""
    flat = matrix.contiguous().flatten()
    return flat.clone() if flat.storage_offset() % width else flat


def _packed_bytes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n], n a multiple of 8 -> their bit stream, uint8 [n * bits / 8]."""
    if bits == 8:
        return codes
    if bits == 4:  # two codes make a byte: one merge instead of three, in half the memory
        pairs = codes.view(torch.int16)
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    lanes = _close_gaps(codes.view(torch.int64), bits)
    if bits == 2:  # whole integers cast faster than bytes gather
        return lanes.to(torch.int16).view(torch.uint8)
    return lanes.view(torch.uint8).view(-1, 8)[:, :bits].flatten()


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """int32 [rows, ceil(cols * bits / 32)] -> uint8 codes [rows, cols]; the inverse of `pack`.

    Raises ValueError where the words are not as many as `cols` codes need.
    """
    check_bits(bits)
    if packed.dtype is not torch.int32 or packed.ndim != 2:
        raise ValueError(f"packed codes must be int32 [rows, words], got {packed.dtype} {list(packed.shape)}")
    rows, words = packed.shape
    if words != packed_words(cols, bits):
        raise ValueError(
            f"{words} words per row cannot hold {cols} codes of {bits} bits, which take {packed_words(cols, bits)}"
        )
    codes = torch.empty(rows, cols, dtype=torch.uint8)
    units = -(-cols // 32) * 4  # int64 lanes per row

    def work(piece: slice) -> None:
        part = packed[piece]
        if words * 4 != units * bits:
            part = torch.nn.functional.pad(part, (0, units * bits // 4 - words))
        stored = _flat(part, 1).view(torch.uint8).view(-1, bits)
        if bits < 8:
            lanes = torch.nn.functional.pad(stored, (0, 8 - bits)).view(torch.int64).squeeze(-1)
            stored = _open_gaps(lanes, bits).view(torch.uint8)
        codes[piece] = stored.reshape(len(part), -1)[:, :cols]

    for_pieces(work, rows, cols)
    return codes
