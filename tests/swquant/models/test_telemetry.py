"""onnxruntime looks up a host when it is imported, unless it is told before not to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.paths import PROJECT

# Says what the variable is at the moment at which anything asks for onnxruntime.
SPY = """
import importlib.abc, os, sys

class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onnxruntime", "onnxruntime_genai"):
            print("telemetry", os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Spy())
"""


def said(statement: str, **environment: str) -> set[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    ran = subprocess.run(
        [sys.executable, "-c", f"{SPY}\n{statement}"],
        env={**inherited, "PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return {line for line in ran.stdout.splitlines() if line.startswith("telemetry")}


@pytest.mark.parametrize(
    "statement",
    [
        "from swquant.models.runtime import require_runtime; require_runtime()",
        "import swquant.export.onnx.check",
        "import swquant.ort, onnxruntime",
        "import subprocess, sys, swquant; subprocess.run([sys.executable, '-c', 'import os; print(\"telemetry\", "
        'os.environ.get("ORT_DISABLE_TELEMETRY"))\'])',
    ],
    ids=["runtime", "export", "ort", "sub-process"],
)
def test_it_is_told_so_before_it_is_imported(statement: str) -> None:
    assert said(statement) == {"telemetry 1"}


def test_who_wants_it_can_have_it() -> None:
    assert said("import swquant.ort, onnxruntime", ORT_DISABLE_TELEMETRY="0") == {"telemetry 0"}
