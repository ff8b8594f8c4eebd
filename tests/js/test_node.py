"""onnxruntime-node and onnxruntime-web run an export: the examples of docs/onnx.md say what `swquant generate` says.

`make test-js` makes the folder of packages; SWQUANT_JS names it.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.paths import PROJECT
from support.tiny_models import PROMPT, planted_model

import swquant

PACKAGES = Path(os.environ.get("SWQUANT_JS", PROJECT / ".venv-js")).resolve()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PACKAGES / "node_modules").is_dir(), reason="needs packages of npm: make test-js"),
]
NODE, WEB = re.findall(r"```js\n(.*?)```", (PROJECT / "docs/onnx.md").read_text(), re.DOTALL)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(code: str, here: Path, *words: str) -> str:
    (here / "example.mjs").write_text(code)
    if not (here / "node_modules").exists():
        (here / "node_modules").symlink_to(PACKAGES / "node_modules")
    ran = subprocess.run(
        ["node", "example.mjs", *words], cwd=here, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("graph", "level"), [("dynamo", 0), ("genai", 0), ("genai", 4)], ids=["dynamo", "genai", "genai, int8"]
)
def test_the_examples_say_what_generate_says(graph: str, level: int, tmp_path: Path) -> None:
    folder = planted_model("llama", tmp_path / "model", intermediate_size=256).folder
    out = swquant.compress(
        folder, tmp_path / "out", format="onnx", prompt=PROMPT, block="32", graph=graph, accuracy_level=level
    ).path
    expected = swquant.generate(out, PROMPT, tokens=8)
    assert run(NODE, tmp_path, str(out), PROMPT) == expected
    with served(out) as address:
        begin = WEB.replace("https://example.org/model-onnx", address).replace("The capital of France is", PROMPT)
        assert run(begin + NODE[NODE.index("const int64") :], tmp_path) == expected
