"""What a probe is told to watch, and what it leaves: types alone, one floor below those who fill and read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Contribution", "LinearRecord", "Peak", "Probe", "Residual", "Scalar", "Spike", "Watch"]


@dataclass(frozen=True)
class Watch:
    """A weight to watch: `parameter` of module `module` (slice `expert` of it, if it is 3-D).

    down: whether it is the down projection of an MLP, whose outputs are explained term by term.
    transposed: stored [in, out] (Conv1D, some fused experts).
    """

    name: str
    module: str
    parameter: str = "weight"
    expert: int | None = None
    down: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Scalar:
    """One weight of a watched tensor: `name`[row, col], row = output channel, col = input channel."""

    name: str
    row: int
    col: int


@dataclass(frozen=True)
class Peak:
    """The value of largest magnitude of an activation [tokens, channels], signed, and where it is."""

    value: float
    token: int
    channel: int
    median: float  # median magnitude of that token's channels: what the peak stands out from

    @property
    def ratio(self) -> float:
        """How many times its own token's median the peak is."""
        return abs(self.value) / self.median if self.median > 0 else float("inf") if self.value else 0.0


@dataclass(frozen=True)
class Contribution:
    """One term x[token, col] * weight[row, col] of a large output of a down projection."""

    col: int
    input: float
    weight: float
    share: float  # of the output value; the shares of all columns (and the bias) sum to 1


@dataclass(frozen=True)
class Spike:
    """The largest output of one row of a down projection, and the largest of its terms."""

    output: Peak
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class LinearRecord:
    """What the products of one weight showed, of several the last.

    energy: float32 [in], mean over tokens of x^2 / |x|^2: the share of an input channel in its token. Every token
    counts the same; in a plain mean square the one token that carries the super activation would drown out all others.
    peaks: float32 [in], the largest |x| of every input channel.
    spikes: of a down projection, the rows with the largest outputs, largest first.
    norm: name of the module whose output the input is, "" if it is no norm's.
    products: how many there were. Models that run a layer more than once make more than one.
    """

    input: Peak
    output: Peak
    energy: Tensor
    peaks: Tensor
    spikes: tuple[Spike, ...] = ()
    norm: str = ""
    products: int = 1

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """The largest terms of the largest output."""
        return self.spikes[0].contributions if self.spikes else ()


@dataclass(frozen=True)
class Residual:
    """The residual stream between two layers. values: float32 [hidden], the signed value of largest magnitude of every
    channel; tokens: int64 [hidden], where it is. whole: float32 [tokens, hidden], of a short prompt."""

    values: Tensor
    tokens: Tensor
    medians: Tensor  # float32 [tokens]: median magnitude of each token's channels
    whole: Tensor | None = None

    def channel(self, index: int) -> Tensor:
        """float32 [tokens]: a channel token by token. Of a long prompt only the largest value is known, others are
        0."""
        if self.whole is not None:
            return self.whole[:, index]
        known = torch.zeros_like(self.medians)
        known[self.tokens[index]] = self.values[index]
        return known

    def at(self, token: int, channel: int) -> float:
        return float(self.channel(channel)[token])


@dataclass
class Probe:
    """Everything one pass leaves. residual[0] enters the first layer, residual[i + 1] leaves layer i."""

    linears: dict[str, LinearRecord] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)  # outputs of norms that feed a product, [tokens, channels]
    residual: list[Residual] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
