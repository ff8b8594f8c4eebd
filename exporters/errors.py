"""The exceptions that users meet. Their message is all a user sees: the value, the limit and the remedy.

Values and names in it come from files. So a message is one line without anything that a terminal obeys, and has an
end, whoever prints it: the command line, a notebook, a log.
"""

from __future__ import annotations

from exporters.text import shown

__all__ = ["CheckpointError", "SwquantError", "first_line"]

_LONGEST, _END = 1500, 500  # characters: a path may be long, a message may name two, and ends with its remedy


class SwquantError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, _LONGEST, tail=_END))


class CheckpointError(SwquantError):
    """A file is not what it should be."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough to stand inside our own message."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
