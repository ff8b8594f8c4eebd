"""The exceptions that users meet. Their message is all a user sees: the value, the limit and the remedy."""

from __future__ import annotations

__all__ = ["CheckpointError", "SwquantError"]


class SwquantError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with 1."""


class CheckpointError(SwquantError):
    """A file is not what it should be."""
