"""Text that was not written here (names, tokens, options of a manifest), as a person may see it.

A terminal obeys what it is shown: an escape sequence in the name of a tensor moves the cursor, sets the title of the
window or hides a line, and a bidirectional control turns `1 of 9 damaged` around. Whatever comes from a file is
therefore shown through `shown`, in messages and in tables alike.
"""

from __future__ import annotations

import json
import re
import unicodedata

__all__ = ["LONGEST", "harmless_json", "shown"]

LONGEST = 300  # characters of a file's text that anybody reads
# Controls, formats (bidirectional ones among them), surrogates, and the two separators that break a line.
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # other libraries' messages have some; nobody wants to read `\x1b[96m`
_JOINERS = "\u200c\u200d"  # formats that only join or part letters: Persian, Hindi and emoji need them


def _harmless(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _OBEYED:
        return character
    return character.encode("unicode_escape").decode()


def shown(value: object, limit: int | None = LONGEST, *, tail: int = 0, keep: str = "") -> str:
    r"""One line without anything that a terminal obeys (`\x1b` stands for ESC; colours are left out), cut at `limit`
    characters.

    tail: so many of them are the text's last ones: a message ends with its remedy. keep: characters that stay as they
    are, for text of several lines.
    """
    text = str(value)
    if limit is not None and len(text) > limit:  # before it is gone through: it may be long
        text = text[: limit - tail] + text[len(text) - tail - 1 :]
    text = _COLOUR.sub("", text)
    text = "".join(character if character in keep else _harmless(character) for character in text)
    if limit is None or len(text) <= limit:
        return text
    return f"{text[: limit - tail - 1]}…{text[len(text) - tail :]}"


def harmless_json(document: str) -> str:
    r"""JSON that says the same, with `\u` escapes for what a terminal obeys. JSON itself escapes ASCII alone."""

    def escaped(match: re.Match[str]) -> str:
        return match[0] if _harmless(match[0]) == match[0] else json.dumps(match[0])[1:-1]

    return re.sub(r"[^\x00-\x7e]", escaped, document)
