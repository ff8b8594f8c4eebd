"""The options of `study`, declared once."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.errors import SwquantError
from swquant.declared import described
from swquant.detect.prompt import DEFAULT_PROMPT

__all__ = ["EXPERIMENTS", "StudyOptions"]

EXPERIMENTS = ("identify", "importance", "persistence", "stopwords", "amplification", "block-size", "activations")


@dataclass(frozen=True)
class StudyOptions:
    """What `study` can be told. Raises SwquantError for values that make no sense."""

    only: tuple[str, ...] = described((), f"Make only this experiment; repeatable. One of: {', '.join(EXPERIMENTS)}.")
    quick: bool = described(False, "A first look in a fifth of the time: fewer windows, factors and block sizes.")
    window: int = described(128, "Tokens per window.")
    limit: int | None = described(None, "Measure on so many windows: 16, or 4 with --quick, unless given.")
    bits: int = described(4, "Bits per weight in the experiment on block sizes, 2 to 8.")
    tasks: tuple[str, ...] = described(
        (), "Zero-shot task of lm-eval, or a task file; repeatable. Needs the extra `tasks` and the task's data."
    )
    task_limit: int | None = described(None, "Ask only the first N questions of each task.")
    download: bool = described(False, "Let lm-eval fetch the data of --tasks; otherwise it must be on this machine.")
    prompt: str = described(DEFAULT_PROMPT, "The one prompt that detection runs.")

    def __post_init__(self) -> None:
        from calibrationless import check_bits

        try:
            check_bits(self.bits)
        except ValueError as error:
            raise SwquantError(str(error)) from None
        if self.task_limit is not None and self.task_limit < 1:
            raise SwquantError(f"a limit of {self.task_limit} questions leaves nothing to ask; give 1 or more, or none")
        if not self.tasks and (self.task_limit is not None or self.download):
            raise SwquantError("--task-limit and --download are about zero-shot tasks; name one with --tasks")
        if unknown := next((name for name in self.only if name not in EXPERIMENTS), None):
            raise SwquantError(f"experiment {unknown!r} is not one of: {', '.join(EXPERIMENTS)}")

    @property
    def windows(self) -> int:
        return self.limit if self.limit is not None else 4 if self.quick else 16

    @property
    def experiments(self) -> tuple[str, ...]:
        """Those to make, in the order of the paper."""
        return tuple(name for name in EXPERIMENTS if not self.only or name in self.only)
