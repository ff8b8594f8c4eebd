"""Text from elsewhere on a console: names, tokens, options, what a model wrote.

`exporters.text.shown` takes away what a terminal obeys; what is left here is rich's own language, in which `[bold]` is
no text. A word is cut at 300 characters. A sentence of ours with such words in it may be longer, and keeps its end,
where its remedy is.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape

from exporters.text import LONGEST, shown

__all__ = ["marked", "marked_sentence", "rates_tried", "sentence", "written"]

_SENTENCE, _END = 1500, 500  # characters: a path may be long, and a message may name two


def marked(value: object) -> str:
    """A word from elsewhere inside markup, as all cells of tables are."""
    return escape(shown(value, LONGEST))


def sentence(text: str) -> str:
    """A sentence with words from elsewhere, for `print(…, markup=False)`."""
    return shown(text, _SENTENCE, tail=_END)


def marked_sentence(text: str) -> str:
    """The same inside markup."""
    return escape(sentence(text))


def rates_tried(tried: Mapping[str, float | None], rate: float) -> str:
    """What `--lr auto` looked at: rate -> held-out loss, None where it diverged; and the one that was taken."""
    losses = ", ".join(f"{each}: {'diverged' if loss is None else f'{loss:.4f}'}" for each, loss in tried.items())
    return f"Rates by held-out loss: {losses}; {rate:g} was taken"


def written(text: str) -> str:
    """What a model wrote: all of it, with its lines."""
    return shown(text, None, keep="\n\t")
