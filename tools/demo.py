"""`make demo`: compress a real model, say what was found and saved, export it to ONNX, and let all versions write.

Runs the same commands that a user would type, and shows them.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PROMPT = "The capital of France is"


def run(*arguments: str) -> None:
    """Show a swquant command and run it."""
    print(f"\n$ swquant {shlex.join(arguments)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "swquant", *arguments])
    if result.returncode:
        sys.exit(result.returncode)


def main() -> None:
    model = Path(sys.argv[1])
    out = Path("demo") / "SmolLM2-135M-w4-b128"
    graph = Path(f"{out}-onnx")
    for folder in (out, graph):
        shutil.rmtree(folder, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    run("compress", str(model), str(out), "--bits", "4", "--block", "128")
    run("inspect", str(out))
    run("export", str(out), str(graph), "--graph", "genai", "--accuracy-level", "4", "--lm-head-bits", "8")
    versions = {
        "Original": model,
        "Compressed to 4 bits": out,
        "In ONNX Runtime, activations and output head in 8 bits": graph,
    }
    for title, source in versions.items():
        print(f"\n== {title} ==", end="")
        run("generate", str(source), PROMPT, "--tokens", "32")


if __name__ == "__main__":
    main()
