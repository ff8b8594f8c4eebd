"""Clipping: cut a block's outliers before they stretch its scale (CLIP_z of the super weight paper).

A rule gives one threshold per block; magnitudes above it are set to it. Without clipping, one large
weight makes the rounding step coarse for its whole block; with it, the step suits the many and the
few are cut (the super weights among them are put back later from the sidecar).

    none             keep everything
    z=9              mean|w| + 9 * std|w|                     (the paper's CLIP_z)
    iqr=3            q3 + 3 * (q3 - q1) of |w|
    quantile=0.999   the largest magnitude that is not among the top 0.1 % of the block

To add a rule, write a function `(magnitudes [blocks, elements], value) -> [blocks, 1]` and enter it in
`RULES` with the range that its value may have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless.pieces import row_sum

__all__ = ["RULES", "Clip", "clip_threshold", "parse_clip"]


def _z_score(magnitudes: Tensor, z: float) -> Tensor:
    count = magnitudes.shape[1]
    mean = row_sum(magnitudes) / count
    variance = row_sum((magnitudes.double() - mean).square_()) / max(count - 1, 1)
    return (mean + z * variance.sqrt()).to(magnitudes.dtype)


def _kth_smallest(ordered: Tensor, position: float) -> Tensor:
    """Linear interpolation between neighbours of rows sorted ascending, as numpy's default quantile."""
    low = math.floor(position)
    high = min(low + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, low : low + 1], ordered[:, high : high + 1], position - low)


def _interquartile(magnitudes: Tensor, factor: float) -> Tensor:
    # torch.quantile refuses more than 16 million elements; a sort has no such limit.
    ordered = magnitudes.sort(dim=1).values
    last = magnitudes.shape[1] - 1
    q1, q3 = _kth_smallest(ordered, 0.25 * last), _kth_smallest(ordered, 0.75 * last)
    return q3 + factor * (q3 - q1)


def _quantile(magnitudes: Tensor, quantile: float) -> Tensor:
    count = magnitudes.shape[1]
    # The guard keeps 1000 * (1 - 0.999) at 1, not at 0.9999…
    clipped = min(int(count * (1.0 - quantile) + 1e-9), count - 1)
    return torch.topk(magnitudes, clipped + 1, dim=1).values[:, -1:]


@dataclass(frozen=True)
class _Rule:
    threshold: Callable[[Tensor, float], Tensor]
    low: float
    high: float
    example: str


RULES: dict[str, _Rule] = {
    "z": _Rule(_z_score, 0.0, 1e6, "z=9"),
    "iqr": _Rule(_interquartile, 0.0, 1e6, "iqr=3"),
    "quantile": _Rule(_quantile, 0.0, 1.0, "quantile=0.999"),
}


@dataclass(frozen=True)
class Clip:
    """A rule's name and its value: Clip("z", 9.0)."""

    rule: str
    value: float

    def __str__(self) -> str:
        return f"{self.rule}={self.value!r}".removesuffix(".0")


def parse_clip(text: str) -> Clip | None:
    """Read `none`, `z=9`, `iqr=3` or `quantile=0.999`. Raises ValueError, naming the rules, otherwise."""
    word = text.strip().lower()
    if word == "none":
        return None
    known = ", ".join(["none", *(rule.example for rule in RULES.values())])
    name, _, number = word.partition("=")
    if name not in RULES:
        raise ValueError(f"clip {text!r} is not known; use one of: {known}")
    rule = RULES[name]
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"clip {text!r} needs a number, for example {rule.example}") from None
    if not rule.low < value <= rule.high:  # also refuses nan
        raise ValueError(f"clip {name} takes a value above {rule.low:g} and at most {rule.high:g}, got {number}")
    return Clip(name, value)


def clip_threshold(blocks: Tensor, clip: Clip) -> Tensor:
    """Threshold of each block: [blocks, elements] -> [blocks, 1], never negative."""
    return RULES[clip.rule].threshold(blocks.abs(), clip.value)
