"""The one prompt that everything is found with, unless the user gives another.

That of the paper. Ten tokens are enough: super activations sit on the first token, whatever follows.
"""

from __future__ import annotations

__all__ = ["DEFAULT_PROMPT", "PROMPT_HELP"]

DEFAULT_PROMPT = "Apple Inc. is a worldwide tech company."
PROMPT_HELP = "The one prompt that detection runs."
