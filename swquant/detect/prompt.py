"""The one prompt."""

from __future__ import annotations

__all__ = ["DEFAULT_PROMPT"]

DEFAULT_PROMPT = "Apple Inc. is a worldwide tech company."
