"""What is laid over decoded weights: patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Outliers", "check_outliers", "restore"]


@dataclass(frozen=True)
class Outliers:
    """Weights kept outside the codes: rows int32 [n], cols int32 [n], values [n] in the original dtype."""

    rows: Tensor
    cols: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.rows.numel()

    @staticmethod
    def at(weight: Tensor, rows: Tensor, cols: Tensor) -> Outliers:
        """The weights at (rows[i], cols[i]) of a [out, in] tensor, sorted by position, each once."""
        flat = torch.unique(rows.to(torch.int64) * weight.shape[1] + cols.to(torch.int64))
        rows, cols = flat // weight.shape[1], flat % weight.shape[1]
        return Outliers(rows.to(torch.int32), cols.to(torch.int32), weight[rows, cols])


def check_outliers(outliers: Outliers, shape: tuple[int, int]) -> None:
    """Raise ValueError where a coordinate lies outside a [out, in] weight: sidecars come from files."""
    for name, index, size in (("row", outliers.rows, shape[0]), ("column", outliers.cols, shape[1])):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(f"an outlier's {name} is outside 0 .. {size - 1}: the sidecar belongs to another weight")


def restore(weight: Tensor, outliers: Outliers) -> Tensor:
    """Put the outliers back into a [out, in] weight, in place. RESTORE of the super weight paper.

    Raises ValueError where a coordinate lies outside the weight.
    """
    check_outliers(outliers, (weight.shape[0], weight.shape[1]))
    weight[outliers.rows.to(torch.int64), outliers.cols.to(torch.int64)] = outliers.values.to(weight.dtype)
    return weight
