"""What is laid over decoded weights: patches, which make single weights exact again.

A patch is a frozen dataclass of tensors: where (int32) and what (`values`, in the original dtype). `KINDS` has a row
per kind, and whoever stores, checks or restores patches asks the table, so that a kind is a row and not a branch:

    points     rows [n], cols [n], values [n]     single weights: super weights, outliers

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

    def __len__(self) -> int:
        return self.rows.numel()

    @staticmethod
    def at(weight: Tensor, rows: Tensor, cols: Tensor) -> Points:
        """The weights at (rows[i], cols[i]) of a [out, in] tensor, sorted by position, each once."""
        flat = torch.unique(rows.to(torch.int64) * weight.shape[1] + cols.to(torch.int64))
        rows, cols = flat // weight.shape[1], flat % weight.shape[1]
        return Points(rows.to(torch.int32), cols.to(torch.int32), weight[rows, cols])


Patch = Points


@dataclass(frozen=True)
class Kind:
    """patch: the dataclass whose fields are the parts; its constructor takes them in order. noun: for messages.

    shapes: (len of a patch, shape of the weight) -> part -> its shape. places: the int64 rows and columns of all values
    of a patch for a weight with so many rows, of shapes that broadcast to that of `values`.
    """

    patch: Callable[..., Patch]
    noun: str
    shapes: Callable[[int, tuple[int, int]], dict[str, tuple[int, ...]]]
    places: Callable[[Any, int], tuple[Tensor, Tensor]]


KINDS: dict[str, Kind] = {
    "points": Kind(
        Points,
        "an outlier",
        lambda count, shape: {"rows": (count,), "cols": (count,), "values": (count,)},
        lambda patch, rows: (patch.rows.to(torch.int64), patch.cols.to(torch.int64)),
    ),
}


def kind_of(patch: Patch) -> Kind:
    """The row of `KINDS` that a patch belongs to."""
    return next(kind for kind in KINDS.values() if kind.patch is type(patch))


def parts_of(patch: Patch) -> dict[str, Tensor]:
    """Part -> tensor, in the order of the dataclass."""
    return {item.name: getattr(patch, item.name) for item in fields(patch)}


def check_patch(patch: Patch, shape: tuple[int, int], tensor: str = "") -> None:
    """Raise ValueError unless a patch fits a [out, in] weight: sidecars come from files. tensor: its name.

    Checked: dtypes and shapes of the parts, that every place lies inside the weight and occurs once, and that no value
    is NaN or infinite.
    """
    kind, parts = kind_of(patch), parts_of(patch)
    who = f"{kind.noun} of {tensor}" if tensor else kind.noun
    expected = kind.shapes(patch.cols.numel(), shape)
    for name, part in parts.items():
        if tuple(part.shape) != expected[name] or part.dtype not in (
            VALUE_DTYPES if name == "values" else (torch.int32,)
        ):
            raise ValueError(
                f"{who}: {name} {list(part.shape)} of {part.dtype} do not belong to {patch.cols.numel()} of a {list(shape)} weight"
            )
    for name, word, size in (("rows", "row", shape[0]), ("cols", "column", shape[1])):
        index = parts.get(name)
        if index is not None and index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(
                f"{who}: its {word} is outside 0 .. {size - 1}, outside its shape {list(shape)}; the sidecar belongs to "
                "another weight"
            )
    rows, cols = kind.places(patch, shape[0])
    places = (rows * shape[1] + cols).flatten()
    if torch.unique(places).numel() != places.numel():
        raise ValueError(f"{who}: the same place occurs twice; the sidecar is damaged")
    if not bool(torch.isfinite(patch.values).all()):
        raise ValueError(f"{who} is NaN or infinite")


def restore(weight: Tensor, *patches: Patch) -> Tensor:
    """Put the original values back into a [out, in] weight, in place. RESTORE of the super weight paper.

    Raises ValueError where a patch does not fit the weight.
    """
    for patch in patches:
        check_patch(patch, shape_of(weight))
    for patch in patches:
        weight[kind_of(patch).places(patch, weight.shape[0])] = patch.values.to(weight.dtype)
    return weight


def covered(patches: Iterable[Patch], shape: tuple[int, int]) -> Tensor | None:
    """bool [out, in], True where a patch holds the weight; None where none does."""
    held = [patch for patch in patches if len(patch)]
    if not held:
        return None
    mask = torch.zeros(shape, dtype=torch.bool)
    for patch in held:
        mask[kind_of(patch).places(patch, shape[0])] = True
    return mask
