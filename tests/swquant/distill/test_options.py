"""What `distill` can be told, and what it refuses before any work."""

from __future__ import annotations

import pytest

from exporters.errors import SwquantError
from swquant.distill.options import DistillOptions


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"keep_layers": "8/7"}, "leaves all"),
        ({"keep_layers": "0"}, "leaves no student"),
        ({"keep_layers": "1.5"}, "leaves no student"),
        ({"keep_layers": "most"}, "leaves no student"),
        ({"keep_layers": "1/0"}, "leaves no student"),
        ({"layers": "0-"}, "is no layer"),
        ({"layers": "5-2"}, "is no layer"),
        ({"layers": "first,,last"}, "is no layer"),
        ({"steps": -1}, "too few"),
        ({"batch": 0}, "too few"),
        ({"texts": 1}, "too few"),
        ({"window": 1}, "too few"),
        ({"temperature": 0.0}, "outside 0"),
        ({"lr": "1e30"}, "no rate"),
        ({"lr": "fast"}, "no rate"),
        ({"alpha": -1.0}, "outside 0"),
        ({"kd_until": "soon"}, "is not auto"),
        ({"kd_until": "1.5"}, "is not auto"),
    ],
)
def test_options_that_make_no_sense(options: dict, problem: str) -> None:
    with pytest.raises(SwquantError, match=problem):
        DistillOptions(**options)


@pytest.mark.parametrize(("text", "count"), [("7/8", 26), ("26", 26), ("0.5", 15), ("29/30", 29)])
def test_how_many_layers_stay(text: str, count: int) -> None:
    assert DistillOptions(keep_layers=text).count_of(30) == count


def test_layers_by_name() -> None:
    assert DistillOptions().listed(6) is None
    assert DistillOptions(layers="first, 2-3,last").listed(6) == (0, 2, 3, 5)
    for named, problem in (("0-6", "they are 0 to 5"), ("0-5", "all 6 layers")):
        with pytest.raises(SwquantError, match=problem):
            DistillOptions(layers=named).listed(6)


def test_the_stage_of_the_teacher() -> None:
    stages = [DistillOptions(kd_until=when).stage(50) for when in ("always", "never", "0.6", "auto")]
    assert stages == [50, 0, 30, None]
