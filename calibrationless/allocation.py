"""How many bits each group of tensors gets out of a common budget.

For errors that are not too large the loss of a model is a sum over its layers, each in proportion to the squared error
of that layer alone (the linearity theorem of HIGGS, Malinovskii et al., 2024). So the best allocation is a knapsack:
every group has a few choices with a size and a loss. Steps along the lower convex hull of each group's choices, best
ratio first, are optimal up to the last step that no longer fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["allocate"]


def allocate(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The index of each group's choice.

    sizes: of every group, what its choices take, rising. losses: what they cost in quality. budget: what all chosen
    ones may take together. Raises ValueError where even the smallest do not fit.
    """
    chosen = [0] * len(sizes)
    left = budget - sum(group[0] for group in sizes)
    if left < 0:
        raise ValueError(f"a budget of {budget:g} is below {budget - left:g}, what the smallest choices take")
    steps: list[tuple[float, int, int]] = []

    def offer(group: int) -> None:
        """The next step of a group along its hull: of the choices that fit, that with the largest gain for what it
        takes more."""
        now = chosen[group]
        ratios = [
            ((losses[group][now] - losses[group][later]) / extra, -later)
            for later in range(now + 1, len(sizes[group]))
            if (extra := sizes[group][later] - sizes[group][now]) <= left
        ]
        if ratios and max(ratios)[0] > 0:
            ratio, later = max(ratios)
            heapq.heappush(steps, (-ratio, group, -later))

    for group in range(len(sizes)):
        offer(group)
    while steps:
        _, group, later = heapq.heappop(steps)
        extra = sizes[group][later] - sizes[group][chosen[group]]
        if extra <= left:
            left -= extra
            chosen[group] = later
        offer(group)
    return chosen
