"""The options of `distill`, declared once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypedDict

from exporters.errors import SwquantError
from swquant.declared import described, parse_rate

__all__ = ["DistillKeywords", "DistillOptions"]


@dataclass(frozen=True)
class DistillOptions:
    """What `distill` can be told. Raises SwquantError for values that make no sense, alone or together."""

    keep_layers: str = described(
        "7/8", "How many layers stay: a share (7/8, 0.875) or a number (26).", group="basic", metavar="SHARE|N"
    )
    layers: str = described(
        "auto",
        "Which stay: auto (those missed most), or numbers like 0-11,13,last.",
        group="basic",
        metavar="LIST",
    )
    keep_super: bool = described(
        True,
        "With auto, keep the layers that create or cancel a super activation.",
        group="basic",
        off="no-keep-super",
    )
    steps: int = described(0, "Steps of training; 0 writes the student as it is cut.", group="basic", metavar="N")
    alpha: float = described(1.0, "Weight of the teacher in the loss: L + alpha T² KL.", group="training", metavar="A")
    temperature: float = described(1.0, "T, by which both models' logits are divided.", group="training", metavar="T")
    kd_until: str = described(
        "auto",
        "The teacher stays for a share of the steps (0.6), always, never, or auto.",
        group="training",
        metavar="WHEN",
    )
    lr: str = described(
        "0.0001",
        "Learning rate of the first step, falling to zero; auto tries some on held-out text.",
        group="training",
        metavar="RATE",
    )
    batch: int = described(4, "Windows of a step.", group="training", metavar="N")
    window: int = described(256, "Tokens of a window.", group="training", metavar="N")
    texts: int = described(
        64, "Windows that the teacher writes where no --text is given.", group="training", metavar="N"
    )
    seed: int = described(0, "Of the text that the teacher writes, and of the order of windows.", metavar="N")

    def __post_init__(self) -> None:
        self.count_of(1 << 20)
        self.listed(1 << 20)
        for name, least in (("steps", 0), ("batch", 1), ("texts", 2), ("window", 2)):
            if getattr(self, name) < least:
                raise SwquantError(f"--{name} {getattr(self, name)} is too few; give {least} or more")
        if not 0 < self.temperature < float("inf"):
            raise SwquantError(f"--temperature {self.temperature:g} is outside 0 to infinity")
        if not 0 <= self.alpha < float("inf"):
            raise SwquantError(f"--alpha {self.alpha:g} is outside 0 to infinity; 0 is no teacher")
        self.stage(1)
        self.rate  # noqa: B018 - raise on nonsense now

    @property
    def rate(self) -> float | None:
        """The learning rate, None where it is to be found out."""
        return parse_rate(self.lr)

    def count_of(self, depth: int) -> int:
        """How many of `depth` layers stay. Raises SwquantError for none, and for all of them."""
        share = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.keep_layers.strip())
        try:
            if share is not None:
                count = round(depth * int(share[1]) / int(share[2]))
            elif re.fullmatch(r"\d{1,6}", self.keep_layers.strip()):
                count = int(self.keep_layers)
            else:
                part = float(self.keep_layers)
                count = round(depth * part) if 0 < part < 1 else -1
        except (ValueError, ZeroDivisionError):
            count = -1
        if not 0 < count < depth:
            raise SwquantError(
                f"--keep-layers {self.keep_layers} leaves {'no student' if count < 1 else 'all'} of {depth} layers; give a share "
                "like 7/8, or a number of layers"
            )
        return count

    def listed(self, depth: int) -> tuple[int, ...] | None:
        """The layers that were named, ascending; None for auto. Raises SwquantError for those that do not exist."""
        if self.layers == "auto":
            return None
        names = {"first": 0, "last": depth - 1}
        chosen: set[int] = set()
        for part in self.layers.split(","):
            match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
            if part.strip() in names:
                chosen.add(names[part.strip()])
            elif match is not None and int(match[1]) <= int(match[2] or match[1]) < depth:
                chosen |= {*range(int(match[1]), int(match[2] or match[1]) + 1)}
            else:
                raise SwquantError(
                    f"--layers {self.layers}: {part.strip()!r} is no layer; they are 0 to {depth - 1}, first, last, and ranges "
                    "like 0-11"
                )
        if len(chosen) == depth:
            raise SwquantError(f"--layers {self.layers} are all {depth} layers; leave some out")
        return tuple(sorted(chosen))

    def stage(self, steps: int) -> int | None:
        """The step from which the teacher is gone; None where that is found out on the way. Raises SwquantError."""
        named = {"auto": None, "always": steps, "never": 0}
        if self.kd_until in named:
            return named[self.kd_until]
        try:
            share = float(self.kd_until)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise SwquantError(
                f"--kd-until {self.kd_until} is not auto, always, never or a share of the steps from 0 to 1"
            )
        return round(share * steps)


class DistillKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.distill` that editors complete; a test compares the two."""

    keep_layers: str
    layers: str
    keep_super: bool
    steps: int
    alpha: float
    temperature: float
    kd_until: str
    lr: str
    batch: int
    window: int
    texts: int
    seed: int
