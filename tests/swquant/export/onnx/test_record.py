"""What the check says in the manifest is JSON, whatever the logits are."""

from __future__ import annotations

import pytest

from swquant.export.onnx.check import _finite


@pytest.mark.parametrize(
    ("difference", "said"), [(0.123456, 0.123), (float("inf"), None), (float("nan"), None), (0.0, 0.0)]
)
def test_a_difference_beyond_every_number_is_null(difference: float, said: float | None) -> None:
    assert _finite(difference) == said
