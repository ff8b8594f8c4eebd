"""What is laid over decoded weights: patches, which make single weights exact again or move sub-matrices.

A patch is a frozen dataclass of tensors: where (int32) and what (`values`, of a float dtype). `KINDS` has a row per
kind, and whoever stores, checks or restores patches asks the table, so that a kind is a row and not a branch:

    points     rows [n], cols [n], values [n]           single weights: super weights, outliers
    blocks     rows [n], cols [n], values [n, B, B]     sub-matrices on a grid of B x B, replaced or added: what `tune`
                                                        trains (Sparse Matrix Tuning, arXiv:2405.15525)

To add a kind, write its dataclass and enter it in `KINDS` with the shapes of its parts and the places that it covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from calibrationless.blocks import shape_of

__all__ = [
    "KINDS",
    "Blocks",
    "Kind",
    "Patch",
    "Points",
    "check_patch",
    "covered",
    "kind_of",
    "parts_of",
    "restore",
]

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Points:
    """Weights kept outside the codes: rows int32 [n], cols int32 [n], values [n] in the original dtype."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    mode: str = "replace"

    def __len__(self) -> int:
        return self.rows.numel()

    @staticmethod
    def at(weight: Tensor, rows: Tensor, cols: Tensor) -> Points:
        """The weights at (rows[i], cols[i]) of a [out, in] tensor, sorted by position, each once."""
        flat = torch.unique(rows.to(torch.int64) * weight.shape[1] + cols.to(torch.int64))
        rows, cols = flat // weight.shape[1], flat % weight.shape[1]
        return Points(rows.to(torch.int32), cols.to(torch.int32), weight[rows, cols])


@dataclass(frozen=True)
class Blocks:
    """Sub-matrices of B x B weights on the grid that starts at [0, 0]: rows, cols int32 [n] count whole blocks, values
    [n, B, B] are added to the weight or replace it. Where a block sticks out of the weight, only what lies inside
    counts; the values outside are 0 and mean nothing."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    mode: str = "add"

    def __len__(self) -> int:
        return self.rows.numel()

    @property
    def side(self) -> int:
        """B."""
        return self.values.shape[-1]


Patch = Points | Blocks
Entries = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """patch: the dataclass whose fields are the parts, and how they are laid over (`mode`); its constructor takes them
    in order. noun: for messages. modes: those that it can have.

    shapes: (len of a patch, shape of the weight, last size of its values) -> part -> its shape. entries: (patch, shape
    of the weight) -> int64 rows, int64 columns, values, of shapes that broadcast to one. limits: (shape, last size of
    the values) -> how many rows and columns there are to name.
    """

    patch: Callable[..., Patch]
    noun: str
    modes: tuple[str, ...]
    shapes: Callable[[int, tuple[int, int], int], dict[str, tuple[int, ...]]]
    entries: Callable[[Any, tuple[int, int]], Entries]
    limits: Callable[[tuple[int, int], int], tuple[int, int]] = lambda shape, side: shape


def _points(patch: Points, shape: tuple[int, int]) -> Entries:
    return patch.rows.to(torch.int64), patch.cols.to(torch.int64), patch.values


def _blocks(patch: Blocks, shape: tuple[int, int]) -> Entries:
    """Whole blocks as [n, B, 1], [n, 1, B], [n, B, B]; where some stick out, what is inside as [k] each."""
    inner = torch.arange(patch.side, device=patch.rows.device)
    rows = patch.rows.to(torch.int64).view(-1, 1, 1) * patch.side + inner.view(1, -1, 1)
    cols = patch.cols.to(torch.int64).view(-1, 1, 1) * patch.side + inner.view(1, 1, -1)
    inside = (rows < shape[0]) & (cols < shape[1])
    if bool(inside.all()):
        return rows, cols, patch.values
    return rows.expand(inside.shape)[inside], cols.expand(inside.shape)[inside], patch.values[inside]


KINDS: dict[str, Kind] = {
    "points": Kind(
        Points,
        "an outlier",
        ("replace",),
        lambda count, shape, side: {"rows": (count,), "cols": (count,), "values": (count,)},
        _points,
    ),
    "blocks": Kind(
        Blocks,
        "a block",
        ("add", "replace"),
        lambda count, shape, side: {"rows": (count,), "cols": (count,), "values": (count, side, side)},
        _blocks,
        lambda shape, side: (-(-shape[0] // side), -(-shape[1] // side)),
    ),
}


def kind_of(patch: Patch) -> Kind:
    """The row of `KINDS` that a patch belongs to."""
    return next(kind for kind in KINDS.values() if kind.patch is type(patch))


def parts_of(patch: Patch) -> dict[str, Tensor]:
    """Part -> tensor, in the order of the dataclass."""
    parts = ((item.name, getattr(patch, item.name)) for item in fields(patch))
    return {name: part for name, part in parts if isinstance(part, Tensor)}


def check_patch(patch: Patch, shape: tuple[int, int], tensor: str = "") -> None:
    """Raise ValueError unless a patch fits a [out, in] weight: sidecars come from files. tensor: its name.

    Checked: dtypes and shapes of the parts, that every place lies inside the weight and occurs once, and that no value
    is NaN or infinite.
    """
    kind, parts = kind_of(patch), parts_of(patch)
    who = f"{kind.noun} of {tensor}" if tensor else kind.noun
    side = max(patch.values.shape[-1] if patch.values.ndim else 1, 1)
    expected = kind.shapes(patch.cols.numel(), shape, side)
    for name, part in parts.items():
        if tuple(part.shape) != expected[name] or part.dtype not in (
            VALUE_DTYPES if name == "values" else (torch.int32,)
        ):
            raise ValueError(
                f"{who}: {name} {list(part.shape)} of {part.dtype} do not belong to {patch.cols.numel()} of a {list(shape)} weight"
            )
    places = torch.zeros(patch.cols.numel(), dtype=torch.int64, device=patch.cols.device)
    for name, word, size in zip(("rows", "cols"), ("row", "column"), kind.limits(shape, side), strict=True):
        index = parts.get(name)
        if index is None:
            continue
        places = places * size + index
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(
                f"{who}: its {word} is outside 0 .. {size - 1}, outside its shape {list(shape)}; the sidecar belongs to "
                "another weight"
            )
    if torch.unique(places).numel() != places.numel():
        raise ValueError(f"{who}: the same place occurs twice; the sidecar is damaged")
    if patch.mode not in kind.modes:
        raise ValueError(f"{who} cannot be laid over a weight as {patch.mode!r}")
    if not bool(torch.isfinite(patch.values).all()):
        raise ValueError(f"{who} is NaN or infinite")


def restore(weight: Tensor, *patches: Patch) -> Tensor:
    """Lay patches over a [out, in] weight, one after the other, in place. RESTORE of the super weight paper.

    What is added is added in float32 and rounded once. Raises ValueError where a patch does not fit the weight.
    """
    shape = shape_of(weight)
    for patch in patches:
        check_patch(patch, shape)
    for patch in patches:
        rows, cols, values = kind_of(patch).entries(patch, shape)
        if patch.mode == "add":
            values = weight[rows, cols].to(torch.float32) + values
        weight[rows, cols] = values.to(weight.dtype)
    return weight


def covered(patches: Iterable[Patch], shape: tuple[int, int]) -> Tensor | None:
    """bool [out, in], True where a patch holds the weight itself, not what is added to it; None where none does."""
    held = [patch for patch in patches if len(patch) and patch.mode == "replace"]
    if not held:
        return None
    mask = torch.zeros(shape, dtype=torch.bool, device=held[0].values.device)
    for patch in held:
        rows, cols, _ = kind_of(patch).entries(patch, shape)
        mask[rows, cols] = True
    return mask
