"""The options of `study`, declared once: the command line shows these texts, study.json records these values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from exporters.errors import SwquantError
from swquant.declared import check_choices, described
from swquant.detect.prompt import DEFAULT_PROMPT, PROMPT_HELP

__all__ = ["EXPERIMENTS", "StudyKeywords", "StudyOptions"]

EXPERIMENTS = ("identify", "importance", "persistence", "stopwords", "amplification", "block-size", "activations")


@dataclass(frozen=True)
class StudyOptions:
    """What `study` can be told. Raises SwquantError for values that make no sense."""

    only: tuple[str, ...] = described(
        (),
        f"Make only this experiment; repeatable. One of: {', '.join(EXPERIMENTS)}.",
        group="basic",
        choices=EXPERIMENTS,
        metavar="NAME",
        called="experiment",
    )
    quick: bool = described(
        False, "A first look in a fifth of the time: fewer windows, factors and block sizes.", group="basic"
    )
    window: int = described(128, "Tokens per window.", group="basic", metavar="N")
    limit: int | None = described(
        None, "Measure on so many windows: 16, or 4 with --quick, unless given.", group="basic", metavar="N"
    )
    bits: int = described(4, "Bits per weight in the experiment on block sizes, 2 to 8.", group="basic", metavar="N")
    tasks: tuple[str, ...] = described(
        (),
        "Zero-shot task of lm-eval, or a task file; repeatable. Needs the extra `tasks` and the task's data.",
        group="basic",
        metavar="TASK",
    )
    task_limit: int | None = described(None, "Ask only the first N questions of each task.", group="basic", metavar="N")
    download: bool = described(
        False, "Let lm-eval fetch the data of --tasks; otherwise it must be on this machine.", group="basic"
    )
    prompt: str = described(DEFAULT_PROMPT, PROMPT_HELP, metavar="TEXT")

    def __post_init__(self) -> None:
        from calibrationless import check_bits

        check_choices(self)
        try:
            check_bits(self.bits)
        except ValueError as error:
            raise SwquantError(str(error)) from None
        if self.task_limit is not None and self.task_limit < 1:
            raise SwquantError(f"a limit of {self.task_limit} questions leaves nothing to ask; give 1 or more, or none")
        if not self.tasks and (self.task_limit is not None or self.download):
            raise SwquantError("--task-limit and --download are about zero-shot tasks; name one with --tasks")

    @property
    def windows(self) -> int:
        return self.limit if self.limit is not None else 4 if self.quick else 16

    @property
    def experiments(self) -> tuple[str, ...]:
        """Those to make, in the order of the paper."""
        return tuple(name for name in EXPERIMENTS if not self.only or name in self.only)


class StudyKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.study` that editors complete; a test compares the two."""

    only: tuple[str, ...]
    quick: bool
    window: int
    limit: int | None
    bits: int
    tasks: tuple[str, ...]
    task_limit: int | None
    download: bool
    prompt: str
