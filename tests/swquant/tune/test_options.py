"""Options of `tune`, and budgets."""

from typing import Any

import pytest

from exporters.errors import SwquantError
from swquant.tune.options import Budget, TuneOptions


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("1%", 244),
        ("0.5 %", 122),
        ("8200", 1),
        ("8199", 0),
        ("2MiB", 255),
        ("0.1bits", 97),
        ("0.1 Bits", 97),
        ("1MB", 121),
    ],
)
def test_a_budget_is_a_number_of_blocks(text: str, blocks: int) -> None:
    """Of a model of 100 million parameters, 64 million of them rounded; a block of 64 takes 8,200 bytes."""
    assert Budget.parse(text).blocks(64, parameters=100_000_000, rounded=64_000_000) == blocks


@pytest.mark.parametrize("text", ["", "x", "1 percent", "-1%", "0.1", "bits", "1%%", "nan%"])
def test_what_is_no_budget_is_one_line(text: str) -> None:
    if text == "0.1":  # a plain number is one of bytes
        assert Budget.parse(text).blocks(8, 1000, 1000) == 0
        return
    with pytest.raises(SwquantError, match="is not understood; write 1%"):
        TuneOptions(budget=text)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"select": "best"}, "--select 'best' is not one of: gradient, fisher, recovery, random, diagonal"),
        ({"from_": "head"}, "--from 'head' is not one of: attention, mlp, all"),
        ({"budget": "100.5%"}, "--budget 100.5%: more than all of the parameters; 1% is usual"),
        ({"block": 4}, "--block 4 is outside 8 to 1024; 64 is usual"),
        ({"steps": 0}, "--steps 0 is outside"),
        ({"batch": 0}, "--batch 0 is outside"),
        ({"warmup": 0}, "--warmup 0 is outside"),
        ({"texts": 1}, "--texts 1 is outside"),
        ({"window": 1}, "--window 1 predicts nothing"),
        ({"lr": "fast"}, "--lr 'fast' is no rate"),
        ({"lr": "0"}, "--lr '0' is no rate"),
        ({"lr": "nan"}, "--lr 'nan' is no rate"),
        ({"precision": "int8"}, "--precision 'int8' is not one of"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_one_line(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SwquantError, match=problem):
        TuneOptions(**changes)


def test_auto_is_no_rate_yet() -> None:
    assert TuneOptions().rate is None
    assert TuneOptions(lr="3e-4").rate == 3e-4
