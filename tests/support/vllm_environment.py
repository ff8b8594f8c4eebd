"""vLLM in an environment of its own, and swquant-vllm in a folder beside it: `make test-vllm` makes both."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.paths import PROJECT

__all__ = ["asked", "needs_vllm", "vllm_on"]

PYTHON = PROJECT / ".venv-vllm/bin/python"
PLUGIN = PROJECT / ".venv-plugin"
SWITCH = "SWQUANT_VLLM"  # set by `make test-vllm`, where a missing environment is a failure


def needs_vllm() -> None:
    """Skips a test where there is no vLLM."""
    for path in (PYTHON, PLUGIN / "swquant_vllm"):
        if not path.exists():
            if os.environ.get(SWITCH):
                pytest.fail(f"{path} is absent")
            pytest.skip("vLLM's environment is absent; `make test-vllm` makes it")


def asked(program: str, question: Any, answer: Path, *, plugin: bool = False) -> str:
    """What a program of tests/vllm, run in vLLM's environment, writes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [PYTHON, PROJECT / "tests/vllm" / program, answer],
        input=json.dumps(question),
        text=True,
        capture_output=True,
        check=False,
        env={**environment, "PYTHONPATH": str(PLUGIN)} if plugin else environment,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return answer.read_text()


def vllm_on(
    folders: Mapping[str, Path], prompts: list[list[int]], answer: Path, *, plugin: bool = False, **question: Any
) -> dict[str, Any]:
    """Name of a folder -> what `ask_vllm.py` says of it. question: the rest of what it reads."""
    question |= {"folders": [str(folder) for folder in folders.values()], "prompts": prompts}
    lines = [json.loads(line) for line in asked("ask_vllm.py", question, answer, plugin=plugin).splitlines()]
    said = {line["folder"]: line["answer"] for line in lines}
    return {name: said[str(folder)] for name, folder in folders.items()}
