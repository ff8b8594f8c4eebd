"""SIGKILL at many moments: OUT is whole or the old one, and the next run goes on from what is left, or removes it.

The slow test is long, so it ends after SWQUANT_KILLS_SECONDS (600) for each verb and says how far it came;
SWQUANT_KILLS_FIRST=N goes on from there, SWQUANT_KILLS=N asks for other numbers than 1,000 and 100.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import planted_model

PROGRAM = PROJECT / "tests/support/killed.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As little to compute as there can be: what is killed is the writing."""
    return planted_model("llama", tmp_path_factory.mktemp("small") / "small", torch.bfloat16).folder


def kill(verb: str, model: Path, folder: Path, first: int, count: int, seconds: float) -> dict[str, Any]:
    words = [sys.executable, PROGRAM, verb, model, folder / "kills", first, count, seconds]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def check(found: dict[str, Any]) -> None:
    assert found["broken"] == []
    assert found["lost"] == []
    assert found["debris"] == []
    assert found["other bytes"] == []


def test_a_killed_compress_leaves_nothing_that_looks_whole(small: Path, tmp_path: Path) -> None:
    found = kill("compress", small, tmp_path, 0, 6, 120)
    check(found)
    assert found["kills"] + found["too late"] >= 4
    assert found["taken up"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "count"), [("compress", 1000), ("export", 100)])
def test_many_kills(small: Path, tmp_path: Path, verb: str, count: int) -> None:
    first = int(os.environ.get("SWQUANT_KILLS_FIRST", "0"))
    count = int(os.environ.get("SWQUANT_KILLS", str(count)))
    seconds = float(os.environ.get("SWQUANT_KILLS_SECONDS", "600"))
    found = kill(verb, small, tmp_path, first, count - first, seconds)
    print(found)
    check(found)
    if found["next"] < count:
        pytest.skip(
            f"{found['next']} of {count} kills in {seconds:.0f} s, all well; SWQUANT_KILLS_FIRST={found['next']}"
        )
