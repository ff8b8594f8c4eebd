"""The options of `adapt`, declared once: the command line shows these texts, the manifest records these values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypedDict, cast

from exporters.errors import SwquantError
from swquant.declared import check_choices, described
from swquant.tune.options import TuneOptions

if TYPE_CHECKING:
    from swquant.checkpoints.pool_schema import AdaptOptionsRecord

__all__ = ["POLICIES", "AdaptKeywords", "AdaptOptions"]

POLICIES = ("lw2g", "grow", "one", "random")
# Fields that mean what they mean for `tune`.
_OF_TUNE = (
    "budget",
    "block",
    "select",
    "from_",
    "steps",
    "lr",
    "batch",
    "window",
    "warmup",
    "texts",
    "precision",
    "seed",
)


@dataclass(frozen=True)
class AdaptOptions:
    """What `adapt` can be told. Raises SwquantError for values that make no sense."""

    policy: str = described(
        "lw2g",
        "Reuse a set or grow one: by gradients, always grow, one set for all, or at random.",
        group="basic",
        choices=POLICIES,
    )
    threshold: str = described(
        "auto",
        "Share beyond chance up to which a set is reused; auto: the base's own.",
        group="basic",
        metavar="X",
    )
    budget: str = described(
        "0.1bits",
        "What a set may take: 1% of the parameters, 2MiB, or 0.1bits more per rounded weight.",
        group="basic",
        metavar="SIZE",
    )
    block: int = described(64, "Side of a block, in weights.", group="basic", metavar="N")
    select: str = described(
        "fisher", "By what a new set's blocks are chosen.", group="basic", choices=("gradient", "fisher", "random")
    )
    from_: str = described(
        "all",
        "Layers that blocks are chosen from.",
        group="basic",
        choices=("attention", "mlp", "all"),
        called="--from",
    )
    energy: float = described(
        0.9, "Share of an input's energy that the space of a task holds.", group="training", metavar="X"
    )
    soft: float = described(
        0.0,
        "Share of a step that is kept off what the base's own text makes layers see.",
        group="training",
        metavar="X",
    )
    growth: float = described(0.5, "How often --policy random grows a set.", group="training", metavar="X")
    steps: int = described(60, "Steps of training for each task.", group="training", metavar="N")
    lr: str = described(
        "auto",
        "Learning rate; auto tries some for a few steps each on held-out text.",
        group="training",
        metavar="RATE",
    )
    batch: int = described(2, "Windows per step.", group="training", metavar="N")
    window: int = described(256, "Tokens per window.", group="training", metavar="N")
    warmup: int = described(8, "Batches by which is decided; nothing moves.", group="training", metavar="N")
    texts: int = described(
        8, "Windows that the base writes, to know what it sees by itself.", group="training", metavar="N"
    )
    precision: str = described(
        "float32", "What products are computed in.", group="training", choices=("float32", "bfloat16")
    )
    seed: int = described(0, "Of the order of text, of what is written, of random decisions.", metavar="N")

    def __post_init__(self) -> None:
        check_choices(self)
        self.training, self.limit  # noqa: B018 - raise on nonsense now, not after the text is written
        if not 0 < self.energy <= 1:
            raise SwquantError(f"--energy {self.energy} is outside 0 to 1; 0.9 is usual")
        for name in ("soft", "growth"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise SwquantError(f"--{name} {value} is outside 0 to 1")

    @property
    def training(self) -> TuneOptions:
        """Those that mean what they mean for `tune`, checked by it."""
        return TuneOptions(**{name: getattr(self, name) for name in _OF_TUNE})

    @property
    def limit(self) -> float | None:
        """The threshold, None where it is dynamic."""
        if self.threshold == "auto":
            return None
        try:
            limit = float(self.threshold)
        except ValueError:
            limit = math.nan
        if not -1 <= limit <= 1:
            raise SwquantError(f"--threshold {self.threshold!r} is no share between -1 and 1; auto is usual")
        return limit

    def as_dict(self) -> AdaptOptionsRecord:
        return cast("AdaptOptionsRecord", asdict(self))


class AdaptKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.adapt` that editors complete; a test compares the two."""

    policy: str
    threshold: str
    budget: str
    block: int
    select: str
    from_: str
    energy: float
    soft: float
    growth: float
    steps: int
    lr: str
    batch: int
    window: int
    warmup: int
    texts: int
    precision: str
    seed: int
