"""Subspaces: what tasks have made a layer's input see, and how much of a gradient they would not let through.

A block [B, B] of a weight that learns from inputs x [tokens, B] has a gradient g^T x, whose rows lie where x lies. An
older task whose inputs span S [B, r] does not notice a change D of the block if D S = 0, so a new task may only learn
what is left of its gradient beside S, G (I - S S^T): gradient projection (arXiv:2103.09762). LW2G (arXiv:2409.18860)
calls the angle between both *hinder forward capability*, and grows a new set of parameters where it is too large:

    HFC(G, S) = acos(|G (I - S S^T)| / |G|)

The angle grows with the rank of S, whatever G is: a random S of rank r takes r / B of |G|^2 away. So what is compared
is the share that S takes beyond chance, 0 for a random S and 1 for one that takes everything.

Bases come side by side, [blocks, B, r], with columns of zeros where one has a smaller rank than the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Hindrance", "basis_of", "hindrance", "overlap", "projector", "ranks", "second_moment", "shuffled"]

_EXACT = torch.float64
# Below this share of the trace an eigenvector is rounding noise.
_NOISE = 1e-10


def second_moment(x: Tensor) -> Tensor:
    """x [..., tokens, B] -> float64 [..., B, B], the sum of x x^T over tokens; sums of pieces add up."""
    exact = x.to(_EXACT)
    return exact.mT @ exact


def ranks(basis: Tensor) -> Tensor:
    """int64 [...]: how many columns of a basis [..., B, r] are not zero."""
    return basis.ne(0).any(dim=-2).sum(dim=-1)


def basis_of(moment: Tensor, energy: float, known: Tensor | None = None) -> Tensor:
    """An orthonormal basis of what inputs with this second moment span.

    moment: [..., B, B]. energy: the share of its trace that the basis holds at least; as few columns as that takes.
    known: [..., B, r], a basis that is kept as it is and gets more columns where it holds too little of this moment.
    Returns float32 [..., B, r']. Raises ValueError for an energy that is none.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"an energy of {energy} is outside 0 to 1; 0.95 is usual")
    moment = moment.to(_EXACT)
    total = moment.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    if known is None:
        known = moment.new_zeros(*moment.shape[:-1], 0)
    known = known.to(_EXACT)
    beside = projector(known)
    rest = beside @ moment @ beside
    values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    before = total - values.sum(-1, keepdim=True) + values.cumsum(-1) - values
    taken = (before < energy * total - _NOISE * total) & (values > _NOISE * total)
    columns = torch.cat([known, vectors * taken.unsqueeze(-2)], dim=-1)
    used = columns.ne(0).any(dim=-2)
    order = used.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    widest = int(used.sum(-1).max()) if used.numel() else 0
    gathered = columns.gather(-1, order.unsqueeze(-2).expand_as(columns))
    return gathered[..., :widest].to(torch.float32)


def projector(basis: Tensor, strength: float = 1.0) -> Tensor:
    """I - strength S S^T [..., B, B] of a basis [..., B, r]. What is multiplied with it from the left keeps
    1 - strength of what lies in S: nothing by default, all at 0 (soft projection in between)."""
    eye = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
    return eye - strength * (basis @ basis.mT)


@dataclass(frozen=True)
class Hindrance:
    """How much of a gradient lies in a subspace. share: of its squared norm, 0 to 1. chance: what random subspaces of
    these ranks take on average."""

    share: float
    chance: float

    @property
    def angle(self) -> float:
        """HFC in degrees: 0 where nothing is taken, 90 where everything is."""
        return math.degrees(math.asin(math.sqrt(min(max(self.share, 0.0), 1.0))))

    @property
    def chance_angle(self) -> float:
        """The angle of random subspaces."""
        return Hindrance(self.chance, self.chance).angle

    @property
    def excess(self) -> float:
        """The share beyond chance: 0 as a random subspace, 1 everything, below 0 less than a random one. 1 for a
        subspace that is the whole space, which leaves nothing to learn with."""
        room = 1 - self.chance
        return (self.share - self.chance) / room if room > 1e-9 else 1.0


def hindrance(pairs: Iterable[tuple[Tensor, Tensor]]) -> Hindrance:
    """Of a gradient in several parts: (gradient [n, rows, B], basis of its columns [n, B, r]) each. A gradient of zero
    is not hindered."""
    total = taken = by_chance = 0.0
    for gradient, basis in pairs:
        gradient, basis = gradient.to(_EXACT), basis.to(_EXACT)
        of_block = gradient.square().sum(dim=(-2, -1))
        total += float(of_block.sum())
        taken += float((gradient @ basis).square().sum())
        by_chance += float((of_block * ranks(basis) / basis.shape[-2]).sum())
    return Hindrance(taken / total, by_chance / total) if total else Hindrance(0.0, 0.0)


def shuffled(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random basis of the same shape and ranks: the control that knows nothing but the ranks."""
    drawn = torch.randn(*basis.shape[:-1], basis.shape[-2], generator=generator, dtype=_EXACT)
    columns: Tensor = torch.linalg.qr(drawn)[0][..., : basis.shape[-1]]
    used = torch.arange(basis.shape[-1]) < ranks(basis).unsqueeze(-1)
    return (columns * used.unsqueeze(-2)).to(basis.dtype)


def overlap(one: Tensor, other: Tensor) -> Hindrance:
    """How much of one subspace lies in another: bases [n, B, r] and [n, B, q] of the same inputs."""
    return hindrance([(one.mT, other)])
