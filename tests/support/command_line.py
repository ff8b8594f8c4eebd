"""What a command left behind, and what it should be: one document, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and the two streams."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


def document(ran: Ran) -> dict:
    """The one JSON document on stdout. NaN is not JSON."""
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("}\n")
    return json.loads(ran.out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def one_line(ran: Ran) -> str:
    """The one line on stderr of a command that failed."""
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.endswith("\n")
    *progress, message = ran.err.splitlines()
    assert all(
        line.startswith(("Probing", "Rehearsing", "Loading", "Evaluating", "Generating")) for line in progress
    ), ran.err
    return message
