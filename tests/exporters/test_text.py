"""Text from a file, made harmless: nothing that a terminal obeys, and no more of it than anybody reads."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.text import LONGEST, harmless_json, shown

ANY = st.text(st.characters(codec=None, exclude_categories=()))  # surrogates, too


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("a b\u00a0c", "a b\u00a0c"),
        ("größe 名 ✓ \U0001f469\u200d\U0001f52c", "größe 名 ✓ \U0001f469\u200d\U0001f52c"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x1b[96mBlue\x1b[0;1m and bold\x1b[m", "Blue and bold"),
        ("\x1b[\x1b[31m2J", r"\x1b[2J"),  # what is left without the colour is no better
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202edcba", r"abc\u202edcba"),
        ("\u2066x\u2069\ufeff", r"\u2066x\u2069\ufeff"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0041", r"\U000e0041"),
        ("[bold]x[/]", "[bold]x[/]"),
        ("", ""),
    ],
)
def test_what_a_terminal_obeys_is_spelled_out(text: str, expected: str) -> None:
    assert shown(text) == expected


@given(ANY, st.integers(5, 40))
def test_it_is_one_short_line_of_harmless_characters(text: str, limit: int) -> None:
    made = shown(text, limit)
    assert len(made) <= limit
    assert len(made.splitlines()) <= 1
    made.encode()
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in made)
    if made == text:
        assert len(text) <= limit


def test_it_is_cut_at_its_end_or_before_it() -> None:
    text = "".join(map(str, range(10_000)))
    assert shown(text) == text[: LONGEST - 1] + "…"
    assert shown(text, 100, tail=20) == f"{text[:79]}…{text[-20:]}"
    assert shown(text, None) == text
    assert shown("\x1b" * 1_000_000, 50) == r"\x1b" * 12 + r"\…"


def test_lines_stay_where_they_are_wanted() -> None:
    assert shown("a\n\tb\x1b", None, keep="\n\t") == "a\n\tb\\x1b"


@given(st.dictionaries(ANY, st.lists(ANY)))
def test_json_says_the_same(content: dict) -> None:
    made = harmless_json(json.dumps(content, ensure_ascii=False))
    assert json.loads(made) == content
    made.encode()
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in made)
