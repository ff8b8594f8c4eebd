"""The options of `merge`, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from exporters.errors import SwquantError
from swquant.declared import check_choices, described

__all__ = ["MergeKeywords", "MergeOptions"]


@dataclass(frozen=True)
class MergeOptions:
    """What `merge` can be told. Raises SwquantError for values that make no sense."""

    set_: tuple[str, ...] = described(
        (), "A set of blocks to merge; all of them by default. May be given again.", group="basic", metavar="NAME"
    )
    points: bool = described(
        False, "Merge the outliers, too: nothing stays in the sidecar, and they lose most.", group="basic"
    )
    texts: int = described(
        16,
        "Texts that the tuned model writes, for error feedback; 0 takes the nearest code of every weight.",
        group="rounding",
        metavar="N",
    )
    seed: int = described(0, "Of what is written.", metavar="N")

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.texts <= 4096:
            raise SwquantError(f"--texts {self.texts} is outside 0 to 4096; 16 is usual")


class MergeKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.merge` that editors complete; a test compares the two."""

    set_: tuple[str, ...]
    points: bool
    texts: int
    seed: int
