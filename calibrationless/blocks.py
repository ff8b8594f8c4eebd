"""Blocks: which weights share one scale.

Rounding to few bits needs a scale, and the only question is how many weights share it. A *block* is
the answer, written by users as a short word and carried everywhere as a frozen dataclass:

    word       class         weights that share a scale           scale of a [out, in] weight
    128        Group(128)    128 neighbours along the inputs      [out, in / 128]
    64x32      Tile(64, 32)  a tile of 64 outputs by 32 inputs    [out / 64, in / 32]
    channel    Channel()     one output channel (a row)           [out, 1]
    tensor     Whole()       all of them                          [1, 1]
    flat:512   Flat(512)     512 neighbours in memory order,      [out * in / 512]
                             across rows (the paper's choice)

All arithmetic happens on one shape: `to_blocks` turns `[out, in]` into `[blocks, elements]` (a view
for every kind except tiles) and `from_blocks` turns it back. Quantization, clipping and the scale
search are therefore written once, for rows of a matrix, and never mention block kinds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Block",
    "Channel",
    "Flat",
    "Group",
    "Tile",
    "Whole",
    "block_elements",
    "block_index",
    "columns",
    "divides",
    "element_position",
    "expand",
    "fit",
    "from_blocks",
    "parse_block",
    "scale_shape",
    "shape_of",
    "to_blocks",
]

# A power of two below this holds too few weights to pay for its scale, and no kernel takes it.
SMALLEST_FALLBACK = 16


@dataclass(frozen=True)
class Group:
    """`size` neighbours along the inputs. [512, 256] with Group(64): scale [512, 4]."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Tile:
    """`rows` outputs by `cols` inputs. [512, 256] with Tile(128, 64): scale [4, 4]."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Channel:
    """One output channel. [512, 256]: scale [512, 1]."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class Whole:
    """The whole tensor. [512, 256]: scale [1, 1]."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class Flat:
    """`size` neighbours in row-major order, rows ignored. [512, 256] with Flat(1024): scale [128]."""

    size: int

    def __str__(self) -> str:
        return f"flat:{self.size}"


Block: TypeAlias = Group | Tile | Channel | Whole | Flat

_FORMS = "a number (128), ROWSxCOLS (128x128), channel, tensor or flat:N (flat:512)"


def parse_block(text: str | int) -> Block:
    """Read the word a user types: `128`, `128x128`, `channel`, `tensor`, `flat:512`.

    Raises ValueError, naming the accepted forms, for anything else.
    """
    word = str(text).strip().lower()
    if word == "channel":
        return Channel()
    if word == "tensor":
        return Whole()
    match = re.fullmatch(r"(flat:)?([1-9][0-9]{0,9})(?:x([1-9][0-9]{0,9}))?", word)
    if not match or (match[1] and match[3]):
        raise ValueError(f"block {text!r} is not one of: {_FORMS}")
    if match[3]:
        return Tile(int(match[2]), int(match[3]))
    return Flat(int(match[2])) if match[1] else Group(int(match[2]))


def shape_of(weight: Tensor) -> tuple[int, int]:
    """(out, in) of a weight, as two numbers."""
    out_features, in_features = weight.shape
    return out_features, in_features


def divides(block: Block, shape: tuple[int, int]) -> bool:
    """Whether `block` tiles a weight of `shape` [out, in] without a remainder."""
    out_features, in_features = shape
    match block:
        case Group(size):
            return in_features % size == 0
        case Tile(rows, cols):
            return out_features % rows == 0 and in_features % cols == 0
        case Flat(size):
            return (out_features * in_features) % size == 0
        case _:
            return True


def _power_of_two_below(limit: int, number: int) -> int:
    """The largest power of two that divides `number` and is at most `limit`."""
    power = number & -number
    while power > limit:
        power >>= 1
    return power


def fit(block: Block, shape: tuple[int, int]) -> Block | None:
    """The block to use for a weight of `shape` [out, in]: `block` itself where it divides, else the
    largest power of two that does and is at least 16; None where there is none.

    SmolLM2's 576 inputs take 64 where 128 was asked for. Tiles fall back side by side; their rows
    may shrink to 1, their columns not below 16.
    """
    if divides(block, shape):
        return block
    out_features, in_features = shape
    match block:
        case Group(size):
            smaller = _power_of_two_below(size, in_features)
            return Group(smaller) if smaller >= SMALLEST_FALLBACK else None
        case Tile(rows, cols):
            if out_features % rows:
                rows = _power_of_two_below(rows, out_features)
            if in_features % cols:
                cols = _power_of_two_below(cols, in_features)
                if cols < SMALLEST_FALLBACK:
                    return None
            return Tile(rows, cols)
        case Flat(size):
            smaller = _power_of_two_below(size, out_features * in_features)
            return Flat(smaller) if smaller >= SMALLEST_FALLBACK else None
    raise AssertionError(f"{block} always divides")


def block_elements(block: Block, shape: tuple[int, int]) -> int:
    """How many weights of a [out, in] tensor share one scale."""
    match block:
        case Group(size) | Flat(size):
            return size
        case Tile(rows, cols):
            return rows * cols
        case Channel():
            return shape[1]
        case Whole():
            return shape[0] * shape[1]


def columns(block: Block, shape: tuple[int, int]) -> int:
    """How many input channels of a [out, in] weight a block reaches across."""
    match block:
        case Tile(_, cols):
            return cols
        case Group(size) | Flat(size):
            return min(size, shape[1])
        case _:
            return shape[1]


def scale_shape(block: Block, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scale (and zero point) of a [out, in] weight; see the table above."""
    out_features, in_features = shape
    match block:
        case Group(size):
            return (out_features, in_features // size)
        case Tile(rows, cols):
            return (out_features // rows, in_features // cols)
        case Channel():
            return (out_features, 1)
        case Whole():
            return (1, 1)
        case Flat(size):
            return (out_features * in_features // size,)


def to_blocks(weight: Tensor, block: Block) -> Tensor:
    """[out, in] -> [blocks, elements], blocks in the order of the flattened scale.

    Raises ValueError where the block does not divide the shape: call `fit` first.
    """
    out_features, in_features = shape = shape_of(weight)
    if not divides(block, shape):
        raise ValueError(f"block {block} does not divide a weight of shape {list(shape)}")
    if isinstance(block, Tile):
        tiles = weight.reshape(out_features // block.rows, block.rows, in_features // block.cols, block.cols)
        return tiles.transpose(1, 2).reshape(-1, block.rows * block.cols)
    return weight.reshape(-1, block_elements(block, shape))


def from_blocks(blocks: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """[blocks, elements] -> [out, in]; the inverse of `to_blocks`."""
    out_features, in_features = shape
    if isinstance(block, Tile):
        tiles = blocks.reshape(out_features // block.rows, in_features // block.cols, block.rows, block.cols)
        return tiles.transpose(1, 2).reshape(out_features, in_features)
    return blocks.reshape(out_features, in_features)


def expand(scale: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """One value for every weight: scale (or zero point) of `scale_shape` -> [out, in]."""
    elements = block_elements(block, shape)
    return from_blocks(scale.reshape(-1, 1).expand(-1, elements), block, shape)


def block_index(rows: Tensor, cols: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """Index, into the flattened scale, of the block that holds each weight (rows[i], cols[i])."""
    match block:
        case Tile(tile_rows, tile_cols):
            index: Tensor = (rows // tile_rows) * (shape[1] // tile_cols) + cols // tile_cols
        case _:
            index = (rows * shape[1] + cols) // block_elements(block, shape)
    return index.to(torch.int64)


def element_position(index: Tensor, block: Block, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(rows, cols) in a [out, in] weight of elements counted through its blocks: `to_blocks` the other way round."""
    if not isinstance(block, Tile):
        return index // shape[1], index % shape[1]
    tile, inside = index // (block.rows * block.cols), index % (block.rows * block.cols)
    across = shape[1] // block.cols
    return tile // across * block.rows + inside // block.cols, tile % across * block.cols + inside % block.cols
