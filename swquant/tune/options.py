"""The options of `tune`, declared once: the command line shows these texts, the manifest records these values."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict, cast

from exporters.errors import SwquantError
from swquant.declared import check_choices, described, parse_rate
from swquant.units import parse_bytes

if TYPE_CHECKING:
    from swquant.checkpoints.schema import TuneOptionsRecord

__all__ = ["SELECTIONS", "Budget", "TuneKeywords", "TuneOptions"]

SELECTIONS = ("gradient", "fisher", "recovery", "random", "diagonal")
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|bits)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What the blocks may take: a share of all parameters, stored bits per rounded weight, or bytes."""

    amount: float
    unit: str

    @staticmethod
    def parse(text: str) -> Budget:
        """`1%`, `0.1bits` or a size. Raises SwquantError for anything else."""
        if match := _BUDGET.fullmatch(text):
            if match[2] == "%" and float(match[1]) > 100:
                raise SwquantError(f"--budget {text}: more than all of the parameters; 1% is usual")
            return Budget(float(match[1]), match[2].lower())
        try:
            return Budget(float(parse_bytes(text)), "bytes")
        except SwquantError:
            raise SwquantError(
                f"--budget {text!r} is not understood; write 1% (of the parameters), 2MiB or 0.1bits (per rounded weight)"
            ) from None

    def blocks(self, side: int, parameters: int, rounded: int) -> int:
        """How many blocks that is. A block takes two bytes a weight and eight for where it lies."""
        if self.unit == "%":
            return int(self.amount / 100 * parameters / side**2)
        given = self.amount if self.unit == "bytes" else self.amount * rounded / 8
        return int(given / (2 * side**2 + 8))


@dataclass(frozen=True)
class TuneOptions:
    """What `tune` can be told. Raises SwquantError for values that make no sense."""

    train: str = described(
        "blocks",
        "What is trained: blocks, the stored scales and offsets (not a byte more), or both.",
        group="training",
        choices=("blocks", "scales", "both"),
    )
    budget: str = described(
        "0.1bits",
        "What the blocks may take: 1% of the parameters, 2MiB, or 0.1bits more per rounded weight.",
        group="basic",
        metavar="SIZE",
    )
    block: int = described(64, "Side of a block, in weights.", group="basic", metavar="N")
    select: str | None = described(
        None,
        "By what blocks are chosen; recovery with --against, else gradient.",
        group="basic",
        choices=SELECTIONS,
    )
    from_: str = described(
        "all",
        "Layers that blocks are chosen from.",
        group="basic",
        choices=("attention", "mlp", "all"),
        called="--from",
    )
    steps: int = described(60, "Steps of training.", group="training", metavar="N")
    lr: str = described(
        "auto",
        "Learning rate; auto tries some for a few steps each on held-out text.",
        group="training",
        metavar="RATE",
    )
    batch: int = described(2, "Windows per step.", group="training", metavar="N")
    window: int = described(256, "Tokens per window.", group="training", metavar="N")
    warmup: int = described(8, "Batches that only choose the blocks; nothing moves.", group="training", metavar="N")
    texts: int = described(
        64, "Windows that the original writes where neither --text nor --data is given.", group="training", metavar="N"
    )
    precision: str = described(
        "float32", "What products are computed in.", group="training", choices=("float32", "bfloat16")
    )
    seed: int = described(0, "Of the order of text, of what is written, of random blocks.", metavar="N")

    def __post_init__(self) -> None:
        check_choices(self)
        self.parsed_budget, self.rate  # noqa: B018 - raise on nonsense now, not after the text is written
        limits = {
            "block": (8, 1024),
            "steps": (1, 1_000_000),
            "batch": (1, 4096),
            "warmup": (1, 100_000),
            "texts": (2, 100_000),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                usual = TuneOptions.__dataclass_fields__[name].default
                raise SwquantError(f"--{name} {value} is outside {low} to {high}; {usual} is usual")
        if self.window < 2:
            raise SwquantError(f"--window {self.window} predicts nothing; 256 is usual")

    @property
    def trains_blocks(self) -> bool:
        return self.train != "scales"

    @property
    def trains_scales(self) -> bool:
        return self.train != "blocks"

    @property
    def parsed_budget(self) -> Budget:
        return Budget.parse(self.budget)

    @property
    def rate(self) -> float | None:
        """The learning rate, None where it is to be found out."""
        return parse_rate(self.lr)

    def as_dict(self) -> TuneOptionsRecord:
        return cast("TuneOptionsRecord", asdict(self))


class TuneKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.tune` that editors complete; a test compares the two."""

    train: str
    budget: str
    block: int
    select: str | None
    from_: str
    steps: int
    lr: str
    batch: int
    window: int
    warmup: int
    texts: int
    precision: str
    seed: int
