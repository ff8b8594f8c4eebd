"""Which patches a rank holds, what they add to its weights, and the modules that add it to a layer's output.

A kernel multiplies codes, which nobody may change. So a patch that replaces weight w by v is added as v - w, after the
kernel: y[:, rows] += x[:, cols] (v - w). What w is, is decoded at the patched places alone, before the kernel packs the
codes its own way.

A rank holds some rows and columns of a weight; `Part` says which. Blocks that its border cuts are kept whole, with
zeros where the rank holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swquant_vllm.sidecar import Patch

__all__ = ["Block", "Blocks", "Columns", "Part", "Points", "decode", "differences", "modules", "positions", "taken"]

Decode = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """The part of a stored [out, in] weight that a layer holds on this rank: for each of its rows (int64 [out]) and
    columns (int64 [in]) the place in the layer, -1 for what is not there."""

    tensor: str
    rows: Tensor
    cols: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the stored weight."""
        return self.rows.numel(), self.cols.numel()


@dataclass(frozen=True)
class Block:
    """Patches in a layer's own rows and columns: rows, cols int64 [n, B], -1 where it has none; values [n, B, B]."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    adds: bool = True


def positions(here: Tensor, size: int) -> Tensor:
    """int64 [size]: where each of `size` stored rows lies in the layer. here: for each row of the layer which stored
    row it is, -1 for a row of another weight."""
    places = torch.full((size,), -1, dtype=torch.int64)
    own = here >= 0
    places[here[own]] = own.nonzero().squeeze(1)
    return places


def taken(patch: Patch, part: Part) -> Block:
    """What a layer holds of a patch."""
    side = patch.values.shape[-1]
    outside = torch.full((side,), -1, dtype=torch.int64)
    inner = torch.arange(side)
    rows = torch.cat([part.rows, outside])[patch.rows.unsqueeze(1) * side + inner]
    cols = torch.cat([part.cols, outside])[patch.cols.unsqueeze(1) * side + inner]
    held = (rows >= 0).any(1) & (cols >= 0).any(1)
    return Block(rows[held], cols[held], patch.values[held], patch.adds)


def decode(packed: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Decode:
    """(rows, cols) -> float32 weights there, of a layer in the layout of compressed-tensors.

    packed: int32 [out, words], code i of a row in its bits [i*b, (i+1)*b), or int8 [out, in]. scale: [out, groups].
    zero: int32 [out*b/32, groups], packed along the outputs, or None for symmetric codes. Rounded to the scale's dtype.
    """
    bits = 8 if packed.dtype == torch.int8 else 32 * packed.shape[1] // width
    group = width // scale.shape[1]

    def at(rows: Tensor, cols: Tensor) -> Tensor:
        groups = cols // group
        if packed.dtype == torch.int8:
            codes = packed[rows, cols].long()
        else:
            zeros = 1 << (bits - 1) if zero is None else _code(zero.T, groups, rows, bits)
            codes = _code(packed, rows, cols, bits) - zeros
        return (codes * scale[rows, groups].float()).to(scale.dtype).float()

    return at


def _code(words: Tensor, rows: Tensor, index: Tensor, bits: int) -> Tensor:
    """Code `index` of each of these rows; one may begin in a word and end in the next."""
    word, shift = index * bits // 32, index * bits % 32
    low = words[rows, word].long() & 0xFFFFFFFF
    high = words[rows, (word + 1).clamp(max=words.shape[1] - 1)].long() & 0xFFFFFFFF
    return ((low | high << 32) >> shift) & ((1 << bits) - 1)


def differences(patches: Sequence[Block], decoded: Decode, width: int) -> list[Block]:
    """What each patch, laid over the ones before it, adds to the decoded weights; 0 where the layer holds nothing."""
    there = [(patch.rows.unsqueeze(2) >= 0) & (patch.cols.unsqueeze(1) >= 0) for patch in patches]
    flat = [
        torch.where(held, patch.rows.unsqueeze(2) * width + patch.cols.unsqueeze(1), -1)
        for patch, held in zip(patches, there, strict=True)
    ]
    places, index = torch.unique(torch.cat([place.flatten() for place in flat]), return_inverse=True)
    now = decoded(places.clamp(min=0) // width, places.clamp(min=0) % width)
    found = []
    for patch, held, at in zip(patches, there, index.split([place.numel() for place in flat]), strict=True):
        before = now[at].view(patch.values.shape)
        after = before + patch.values if patch.adds else patch.values
        now[at] = after.flatten()
        found.append(Block(patch.rows, patch.cols, torch.where(held, after - before, 0)))
    return found


class Points(nn.Module):
    """Single weights: y[:, rows] += x[:, cols] values."""

    rows: Tensor
    cols: Tensor
    values: Tensor

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor) -> None:
        super().__init__()
        for name, tensor in (("rows", rows), ("cols", cols), ("values", values)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> None:
        y.index_add_(-1, self.rows, x.index_select(-1, self.cols).mul_(self.values))


class Blocks(Points):
    """Sub-matrices: rows, cols [n, B], values [n, B, B]."""

    def forward(self, x: Tensor, y: Tensor) -> None:
        found = torch.einsum("...nc,nrc->...nr", x[..., self.cols], self.values)
        y.index_add_(-1, self.rows.flatten(), found.flatten(-2))


class Columns(nn.Module):
    """Channels that a kernel must not round: it sees zeros there, and what they give, x[:, cols] values, is added.

    cols: [k]. values: [k, out].
    """

    cols: Tensor
    values: Tensor

    def __init__(self, cols: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("cols", cols, persistent=False)
        self.register_buffer("values", values, persistent=False)

    def hidden(self, x: Tensor) -> Tensor:
        """What the kernel sees."""
        return x.index_fill(-1, self.cols, 0)

    def forward(self, x: Tensor, y: Tensor) -> None:
        y.add_(x[..., self.cols] @ self.values)


def modules(blocks: Iterable[Block], dtype: torch.dtype) -> nn.ModuleList:
    """One module for all blocks of a size, in the numbers that the layer computes with."""
    by_side: dict[int, list[Block]] = {}
    for block in blocks:
        if block.values.numel():
            by_side.setdefault(block.values.shape[-1], []).append(block)
    made: list[Points] = []
    for side, same in by_side.items():
        rows, cols = (torch.cat([getattr(block, part) for block in same]).clamp(min=0) for part in ("rows", "cols"))
        values = torch.cat([block.values for block in same]).to(dtype)
        if side == 1:
            made.append(Points(rows.flatten(), cols.flatten(), values.flatten()))
        else:
            made.append(Blocks(rows, cols, values))
    return nn.ModuleList(made)
