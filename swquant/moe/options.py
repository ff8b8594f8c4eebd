"""The options of `moe`, declared once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict

from exporters.errors import SwquantError
from swquant.declared import check_choices, described, parse_rate

__all__ = ["MoeKeywords", "MoeOptions"]

_MOST = 4096  # experts of a layer; more are a slip of the finger


@dataclass(frozen=True)
class MoeOptions:
    """What `moe` can be told. Raises SwquantError for values that make no sense, alone or together."""

    experts: str = described(
        "pyramid:4",
        "LAYERSxEXPERTS, the deepest last (10x32,2x64), or pyramid:N: N, and 2N in the last sixth.",
        group="basic",
        metavar="HOW",
    )
    every: int = described(
        2, "A mixture in every so-manieth layer; the last layer has one.", group="basic", metavar="N"
    )
    residual: bool = described(
        True, "Keep the MLP beside its experts: one expert corrects it.", group="basic", off="no-residual"
    )
    top: int = described(1, "Experts that a token is given to.", group="basic", choices=(1, 2))
    expert_size: int | None = described(
        None, "Neurons of an expert; all of the MLP's by default.", group="basic", metavar="N"
    )
    as_: str = described(
        "pr_moe",
        "What is written: pr_moe, or qwen2_moe, which stock loaders take (equal experts, untrained).",
        group="output",
        choices=("pr_moe", "qwen2_moe"),
    )
    steps: int = described(
        0, "Steps that experts, gates and coefficients are trained for, on --text.", group="training", metavar="N"
    )
    lr: str = described(
        "0.0003",
        "Learning rate of the first step, falling to zero; auto tries some on held-out text.",
        group="training",
        metavar="RATE",
    )
    batch: int = described(4, "Windows of a step.", group="training", metavar="N")
    window: int = described(256, "Tokens of a window.", group="training", metavar="N")
    capacity: float = described(
        1.0,
        "While training, tokens that an expert takes, as a multiple of an even share; 0 takes all.",
        group="training",
        metavar="C",
    )
    seed: int = described(
        0, "Of the order of windows, of gates, and of the neurons that smaller experts begin with.", metavar="N"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.every < 1:
            raise SwquantError(f"--every {self.every} is no distance between mixtures; give 1 or more")
        if self.expert_size is not None and self.expert_size < 1:
            raise SwquantError(f"--expert-size {self.expert_size} leaves no neuron; give 1 or more")
        if self.expert_size is not None and not self.residual:
            raise SwquantError(
                "--expert-size needs --residual: experts smaller than the MLP cannot compute alone what it computes"
            )
        for name, least in (("steps", 0), ("batch", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise SwquantError(f"--{name} {getattr(self, name)} is too few; give {least} or more")
        self.rate  # noqa: B018 - raise on nonsense now
        if not 0 <= self.capacity < float("inf"):
            raise SwquantError(f"--capacity {self.capacity:g} is outside 0 to infinity; 1 is an even share")
        fewest = min(count for _, count in self._named) if self.pyramid is None else self.pyramid
        if fewest < max(self.top, 2):
            raise SwquantError(f"--experts {self.experts}: a mixture needs 2 or more experts")

        if self.stock:
            self._check_stock()

    def _check_stock(self) -> None:
        """Raise SwquantError for what Qwen2-MoE has no place for."""
        if not self.residual:
            raise SwquantError("--as qwen2_moe: every mixture of it has a fixed MLP; leave out --no-residual")
        if self.steps:
            raise SwquantError(
                "--as qwen2_moe: a trained expert has a coefficient, which it lacks; leave out --steps, and train OUT as any other"
            )
        if self.pyramid is not None or len({experts for _, experts in self._named}) > 1:
            raise SwquantError(
                f"--as qwen2_moe: one number of experts in all layers, not --experts {self.experts}; name them like 3x8"
            )

    @property
    def stock(self) -> bool:
        """Whether what is written is a stock architecture."""
        return self.as_ != "pr_moe"

    @property
    def rate(self) -> float | None:
        """The learning rate, None where it is to be found out."""
        return parse_rate(self.lr)

    @property
    def pyramid(self) -> int | None:
        """The experts of `pyramid:N`; None where layers and experts are named one by one."""
        match = re.fullmatch(r"pyramid:(\d{1,6})", self.experts)
        if match is None:
            return None
        if int(match[1]) * 2 > _MOST:
            raise SwquantError(f"--experts {self.experts}: more than {_MOST} experts in a layer; give fewer")
        return int(match[1])

    @property
    def _named(self) -> list[tuple[int, int]]:
        """(layers, experts of each) as they were typed."""
        parts = [re.fullmatch(r"(\d{1,6})x(\d{1,6})", part.strip()) for part in self.experts.split(",")]
        named = [(int(part[1]), int(part[2])) for part in parts if part is not None]
        if len(named) < len(parts) or any(layers < 1 or experts > _MOST for layers, experts in named):
            raise SwquantError(
                f"--experts {self.experts!r} is neither LAYERSxEXPERTS (10x32,2x64; at most {_MOST} experts) nor pyramid:N"
            )
        return named

    def experts_of(self, layers: int) -> dict[int, int]:
        """Layer -> experts, of a decoder of so many layers. Raises SwquantError where there are too few."""
        candidates = [layer for layer in range(layers) if (layers - 1 - layer) % self.every == 0]
        if self.pyramid is not None:
            many = max(1, round(len(candidates) / 6))
            counts = [self.pyramid] * (len(candidates) - many) + [2 * self.pyramid] * many
        else:
            counts = [experts for number, experts in self._named for _ in range(number)]
        if len(counts) > len(candidates):
            raise SwquantError(
                f"--experts {self.experts} are {len(counts)} mixtures, --every {self.every} has places for {len(candidates)} in "
                f"{layers} layers; name fewer, or lower --every"
            )
        return dict(zip(candidates[len(candidates) - len(counts) :], counts, strict=True))


class MoeKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.moe` that editors complete; a test compares the two."""

    experts: str
    every: int
    residual: bool
    top: int
    expert_size: int | None
    as_: str
    steps: int
    lr: str
    batch: int
    window: int
    capacity: float
    seed: int
