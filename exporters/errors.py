"""The exceptions that users meet. Their message is all a user sees: the value, the limit and the remedy."""

from __future__ import annotations

__all__ = ["CheckpointError", "SwquantError", "first_line"]


class SwquantError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 1."""


class CheckpointError(SwquantError):
    """A file is not what it should be."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough to stand inside our own message."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
