"""What several commands read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import sample_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text(90))
    return path
