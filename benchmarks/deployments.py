"""Where it runs: every runtime on every file that swquant writes for it, actually run. The table of docs/deployment.md.

    python benchmarks/deployments.py --smollm2 MODEL.gguf [--gemma MODEL.gguf] --json FILE

The model's stored grid is broken first (`grid.py`). Then it is compressed, data-free and with the options that stand in
`FILES`, and each runtime, in a process of its own with the Python or node that it wants, is given token ids and asked

    logits   of a text that nothing has seen (WikiText-2's test excerpt): KL from the original's, in nats, per token
    greedy   how the text goes on, beside what the first row of the same file says: how many tokens are the same until
             one differs. A tie that another order of sums decides ends it too
    speed    tokens per second of that, one at a time, the time of one token taken off

A runtime whose environment is not there is listed as not run: `make test-vllm`, `test-llama`, `test-mlx` and `test-js`
make them. --json remembers what was measured, row by row, so that a run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import break_and_check
from machine import describe

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.evaluate.pipeline import make_windows
from swquant.models.loading import build_model
from swquant.output.destination import write_whole

__all__ = ["ROWS", "short_table", "table"]

HOME = Path(__file__).resolve().parents[1]
READERS = Path(__file__).parent / "readers"
TEXT = HOME / "data/wikitext2-excerpt.txt"
WINDOW, PROMPT, TOKENS, THREADS = 128, 16, 32, 1

# File -> what `compress` is asked for.
FILES: dict[str, dict[str, Any]] = {
    "checkpoint": {"dtype": "bfloat16"},
    "checkpoint, offsets": {"dtype": "bfloat16", "offsets": "float", "block": "32", "restore": False},
    "ONNX": {
        "format": "onnx", "dtype": "float16", "graph": "genai", "block": "32", "accuracy_level": 4, "lm_head_bits": 8,
    },
    "GGUF": {"format": "gguf", "dtype": "bfloat16"},
    "MLX": {"format": "mlx", "dtype": "bfloat16", "block": "32"},
}  # fmt: skip
TITLES = {"smollm2": "SmolLM2-135M", "gemma": "Gemma 3 270M"}


@dataclass(frozen=True)
class Row:
    """A runtime and a file. reader: the program of `readers/` that asks it. place: the environment that it needs."""

    runtime: str
    file: str
    reader: str
    how: str = ""
    place: str = ""


ROWS = (
    Row("swquant.load", "checkpoint", "torch_reader.py", "swquant"),
    Row("transformers", "checkpoint", "torch_reader.py", "stock"),
    Row("transformers, `import swquant.hf`", "checkpoint", "torch_reader.py", "hf"),
    Row("vLLM", "checkpoint", "vllm_reader.py", place=".venv-vllm"),
    Row("vLLM, swquant-vllm", "checkpoint", "vllm_reader.py", place=".venv-plugin"),
    Row("swquant.load", "checkpoint, offsets", "torch_reader.py", "swquant"),
    Row("transformers", "checkpoint, offsets", "torch_reader.py", "stock"),
    Row("mlx-lm", "MLX", "mlx_reader.py", place=".venv-mlx"),
    Row("ONNX Runtime, operator library", "ONNX", "onnx_reader.py", "library"),
    Row("ONNX Runtime", "ONNX", "onnx_reader.py", "stock"),
    Row("onnxruntime-genai", "ONNX", "onnx_reader.py", "genai"),
    Row("onnxruntime-node", "ONNX", "ort_reader.mjs", "node", ".venv-js"),
    Row("onnxruntime-web, run by node", "ONNX", "ort_reader.mjs", "web", ".venv-js"),
    Row("llama.cpp", "GGUF", "llama_reader.mjs", place=".venv-llama"),
    Row("transformers, `gguf_file`", "GGUF", "torch_reader.py", "stock"),
)


def make_files(gguf: Path, work: Path) -> None:
    """The original off its grid, its logits on the text, and every file."""
    source = work / "original"
    if not (work / "asked.json").is_file():
        shutil.rmtree(source, ignore_errors=True)
        break_and_check(gguf, source)
        write_reference(source, work)
    for name, options in FILES.items():
        if not (out := place_of(work, name)).exists():
            swquant.compress(source, out, **options)


def place_of(work: Path, name: str) -> Path:
    return work / (name.lower().replace(", ", "-") + (".gguf" if name == "GGUF" else ""))


def write_reference(source: Path, work: Path) -> None:
    with open_checkpoint(source) as checkpoint, torch.no_grad():
        cut = make_windows(checkpoint, TEXT.read_text(), WINDOW, 3)
        first = [] if cut.bos is None else [cut.bos]
        windows = [[*first, *ids.tolist()] for ids in cut.ids]
        model = build_model(checkpoint, torch.float32)
        logits = [model(torch.tensor([ids])).logits[0].float() for ids in windows[:2]]
    torch.cat(logits).numpy().tofile(work / "original.f32")
    asked = {"windows": windows[:2], "prompt": windows[2][:PROMPT], "vocabulary": logits[0].shape[1]}
    (work / "asked.json").write_text(json.dumps(asked))


def command(row: Row) -> tuple[list[str], dict[str, str]]:
    """What to run, and its environment. Scripts of node must lie beside the packages that they import."""
    script = READERS / row.reader
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOME)}
    if not row.place:
        return [sys.executable, str(script)], environment
    environment.pop("PYTHONPATH")
    if script.suffix == ".mjs":
        for source in READERS.glob("*.mjs"):
            shutil.copyfile(source, HOME / row.place / source.name)
        return ["node", str(HOME / row.place / script.name)], environment
    if row.place == ".venv-plugin":
        environment["PYTHONPATH"] = str(HOME / row.place)
    venv = ".venv-vllm" if row.place == ".venv-plugin" else row.place
    return [str(HOME / venv / "bin/python"), str(script)], environment


def run(row: Row, work: Path) -> dict[str, Any]:
    """What one row of the table says, as the reader left it. Raises RuntimeError with the runtime's last words."""
    asked = json.loads((work / "asked.json").read_text())
    file = place_of(work, row.file).resolve()
    with tempfile.TemporaryDirectory(prefix="swquant-deployments-") as scratch:
        words, environment = command(row)
        out = Path(scratch, "logits.f32")
        request = {**asked, "file": str(file), "how": row.how, "tokens": TOKENS, "threads": THREADS, "out": str(out)}
        ran = subprocess.run(
            words, input=json.dumps(request), env=environment, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip().splitlines() or ["?"])[-1])
        said = json.loads(ran.stdout.strip().splitlines()[-1])
        kl = divergence(work / "original.f32", out, asked["vocabulary"])
    size = sum(path.stat().st_size for path in ([file] if file.is_file() else file.rglob("*")) if path.is_file())
    return {"greedy": said["greedy"], "rate": (TOKENS - 1) / said["seconds"], "kl": kl, "bytes": size}


def divergence(original: Path, found: Path, vocabulary: int) -> float:
    """Mean KL of the original's predictions from those found, over all tokens; both files hold float32 logits
    [tokens, vocabulary]. What a runtime adds beyond the vocabulary (a padded head) is cut off."""
    theirs = np.fromfile(original, np.float32).reshape(-1, vocabulary)
    ours = np.fromfile(found, np.float32).reshape(len(theirs), -1)[:, :vocabulary]
    total = 0.0
    for expected, row in zip(torch.from_numpy(theirs), torch.from_numpy(ours), strict=True):
        truth = expected.double().log_softmax(-1)
        total += float((truth.exp() * (truth - row.double().log_softmax(-1))).sum())
    return total / len(theirs)


def same(first: list[int], second: list[int]) -> int:
    """Tokens until one differs."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown. results: model -> runtime / file -> what `run` gave."""
    for model, rows in results.items():
        yield f"| {TITLES[model]} | file | MB | KL | greedy tokens as in the file's first row | tokens/s |"
        yield "|---|---|---:|---:|---:|---:|"
        first: dict[str, list[int]] = {}
        for row in ROWS:
            if (found := rows.get(f"{row.runtime} / {row.file}")) is None:
                yield f"| {row.runtime} | {row.file} | | not run | | |"
            elif "refused" in found:
                yield f"| {row.runtime} | {row.file} | | refused | {found['refused']} | |"
            else:
                told = first.setdefault(row.file, found["greedy"])
                equal = "" if told is found["greedy"] else f"{same(told, found['greedy'])} of {TOKENS}"
                size = f"{found['bytes'] / 1e6:.0f}"
                yield f"| {row.runtime} | {row.file} | {size} | {found['kl']:.4f} | {equal} | {found['rate']:.1f} |"
        yield ""


def short_table(rows: dict[str, Any]) -> Iterator[str]:
    """What the README shows of one model: runtime / file -> what `run` gave."""
    yield "| runtime | file | MB | KL |"
    yield "|---|---|---:|---:|"
    for row in ROWS:
        if "kl" in (found := rows.get(f"{row.runtime} / {row.file}", {})):
            yield f"| {row.runtime} | {row.file} | {found['bytes'] / 1e6:.0f} | {found['kl']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="a GGUF file")
    parser.add_argument("--gemma", type=Path, help="a GGUF file")
    parser.add_argument("--json", type=Path, required=True, help="remember results there, and go on from them")
    parser.add_argument("--work", type=Path, help="a folder for the files, which stay there and are used again")
    parser.add_argument("--only", default="", metavar="WORD", help="only runtimes whose name contains it")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    models = {key: path for key in TITLES if (path := getattr(arguments, key)) is not None}
    results: dict[str, dict[str, Any]] = {}
    if arguments.json.exists():
        results = json.loads(arguments.json.read_text())["results"]
    with tempfile.TemporaryDirectory(prefix="swquant-deployments-") as scratch:
        for model, gguf in models.items():
            work = (arguments.work or Path(scratch)) / model
            work.mkdir(parents=True, exist_ok=True)
            make_files(gguf, work)
            rows = results.setdefault(model, {})
            for row in ROWS:
                key = f"{row.runtime} / {row.file}"
                if key in rows or arguments.only not in row.runtime or not (HOME / row.place).exists():
                    continue
                try:
                    rows[key] = run(row, work)
                except RuntimeError as error:
                    print(f"{key}: {error}", flush=True)
                    rows[key] = {"refused": str(error)}
                write_whole(
                    arguments.json, json.dumps({"machine": describe(), "results": results}, indent=1).encode() + b"\n"
                )
                print(key, {name: value for name, value in rows[key].items() if name != "greedy"}, flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
