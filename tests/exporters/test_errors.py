"""A message is one harmless line with an end, whoever prints it."""

from __future__ import annotations

from exporters.errors import CheckpointError, SwquantError


def test_a_message_holds_nothing_that_a_terminal_obeys() -> None:
    assert str(CheckpointError("a\x1b]0;b\x07\nc\u202ed; fetch it")) == r"a\x1b]0;b\x07\nc\u202ed; fetch it"


def test_a_long_value_leaves_room_for_the_remedy() -> None:
    message = str(SwquantError(f"x has the value {'9' * 100_000}; fetch it again"))
    assert len(message) <= 1500
    assert message.startswith("x has the value 999")
    assert message.endswith("9; fetch it again")


def test_an_ordinary_message_stays_as_it_is() -> None:
    assert str(SwquantError("größe 3 × 4 is “odd” …; take 4")) == "größe 3 × 4 is “odd” …; take 4"
