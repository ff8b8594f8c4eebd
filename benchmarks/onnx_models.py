"""Our ONNX files beside those of onnxruntime-genai's builder: speed, size, and KL divergence from the original.

    python benchmarks/onnx_models.py --smollm2 MODEL.gguf [--gemma MODEL.gguf] [--calls 60]

The model's stored grid is broken first (grid.py). Then, from the same float32 weights:

    builder fp32       the builder's graph as it is
    builder int4       the builder's own quantization: 4 bits, blocks of 32, accuracy level 4, output head of 8 bits,
                       rounded to nearest or with its k_quant
    ours, level 0      4 bits, blocks of 32, offsets, output head of 8 bits; sums in float
    ours, level 4      the same with activations in int8, and the massive channels kept in float
    ours, integers     as level 4, without offsets (--offsets none) and with outliers, as a checkpoint for vLLM has them
    ours, best         as level 4, compressed with --preset best (the model's own text decides how weights are rounded);
                       in blocks of 32, and in blocks of 16, which the builder's file has room for

Ours are compressed with --dtype float16, as most models come in 16 bits: scales of integers are stored in half.

The head is tied to the embedding in both models, so both sides store one table of 8 bits for both. Ours run on the
operator library, and again on a stock runtime through the function that the file carries. All sessions live in one
process, on one thread, and take turns call by call: one token behind 32 others (decode), 64 tokens behind none
(prefill). So what else the machine does hits all of them alike; medians of processor time are reported, and beside the
builder's int4 the medians of the quotients of neighbouring calls. KL divergence, in nats, is the mean over the tokens
of WikiText-2's excerpt in windows of 128, against the original in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from grid import break_and_check
from machine import describe

import swquant
from exporters.json_file import read_json
from exporters.onnx.files import MODEL
from exporters.onnx.genai import fix_cache_shapes
from exporters.onnx.write import save
from swquant.checkpoints.open import open_checkpoint
from swquant.evaluate.pipeline import Score, make_windows, score_window, window_logits
from swquant.export.onnx.graph import adapt_config
from swquant.models.loading import build_model
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import open_session

TEXT = Path(__file__).parent.parent / "data/wikitext2-excerpt.txt"
WINDOW, PAST, PROMPT = 128, 32, 64
BUILDER = (
    "hf_token=false",
    "windowed_kv_cache=false",
)  # as in our graphs: the cache grows with the text in every layer
WARMUP = 3  # calls that are not counted
BASE = 1  # of ENTRIES: the builder's int4, beside which all others are put


# Folder -> how it differs from 4 bits in blocks of 32 at level 4.
OURS: dict[str, dict[str, Any]] = {
    "level0": {"accuracy_level": 0},
    "level4": {},
    "integers4": {"offsets": "none"},
    "best4": {"preset": "best"},
    "best16": {"preset": "best", "block": "16"},
}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a file, and whether the operator library runs it."""

    name: str
    folder: str
    library: bool = False


ENTRIES = (
    Entry("builder fp32", "builder-fp32"),
    Entry("builder int4, level 4", "builder-int4"),
    Entry("builder int4 k_quant, level 4", "builder-k-quant"),
    Entry("ours, level 0, library", "level0", library=True),
    Entry("ours, level 0, stock runtime", "level0"),
    Entry("ours, level 4, library", "level4", library=True),
    Entry("ours, level 4, stock runtime", "level4"),
    Entry("ours, integers, level 4, library", "integers4", library=True),
    Entry("ours, integers, level 4, stock runtime", "integers4"),
    Entry("ours, best, level 4, library", "best4", library=True),
    Entry("ours, best, blocks of 16, level 4, library", "best16", library=True),
)


def build(source: Path, out: Path, *options: str) -> None:
    """Let the builder export a Hugging Face folder; sizes of the cache become numbers, as in our files."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "graph"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-e", "cpu"]
        command += ["-c", Path(scratch) / "cache", *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        graph = onnx_ir.load(folder / MODEL)
        fix_cache_shapes(graph, read_json(folder / "genai_config.json")["model"]["decoder"]["head_size"])
        out.mkdir()
        save(graph, out)


def make_files(gguf: Path, work: Path) -> None:
    """Everything that is measured, and the original's log-probabilities."""
    break_and_check(gguf, work / "model")
    source = shutil.copytree(work / "model", work / "for-builder")
    adapt_config(source)
    build(source, work / "builder-fp32", "-p", "fp32", "--extra_options", *BUILDER)
    for method, folder in (("rtn", "builder-int4"), ("k_quant", "builder-k-quant")):
        # The builder's default method is rtn under another name, but with a head of 8 bits its graph is invalid (0.18).
        choice = (f"algo_config={method}", "matmul_mixed_precision=last_matmul:int8")
        build(source, work / folder, "-p", "int4", "--extra_options", *BUILDER, *choice)
    shutil.rmtree(source)
    given: dict[str, Any] = {
        "block": "32",
        "dtype": "float16",
        "graph": "genai",
        "accuracy_level": 4,
        "lm_head_bits": 8,
    }
    for folder, changes in OURS.items():
        swquant.compress(work / "model", work / folder, format="onnx", **{**given, **changes})


def write_reference(work: Path, windows: int) -> None:
    """The original's logits on the text, one file for each window, and its tokens."""
    with open_checkpoint(work / "model") as checkpoint, torch.no_grad():
        pieces = make_windows(checkpoint, TEXT.read_text(), WINDOW, windows)
        model = build_model(checkpoint, torch.float32)
        for index, ids in enumerate(pieces.ids):
            logits, _ = window_logits(model, ids, pieces.bos)
            np.save(work / f"logits{index}.npy", logits.numpy())
    tokens = {"bos": pieces.bos, "ids": [ids.tolist() for ids in pieces.ids]}
    (work / "tokens.json").write_text(json.dumps(tokens))


def open_model(folder: Path, library: bool) -> OnnxModel:
    return OnnxModel(open_session(folder / MODEL, library=library), None)


def kl_divergence(work: Path, folder: Path, library: bool) -> float:
    """Mean over all tokens."""
    model, tokens = open_model(folder, library), json.loads((work / "tokens.json").read_text())
    scores: list[Score] = []
    for index, ids in enumerate(tokens["ids"]):
        logits, targets = window_logits(model, torch.tensor(ids), tokens["bos"])
        reference = torch.from_numpy(np.load(work / f"logits{index}.npy"))
        scores.append(score_window(logits, targets, reference))
    return sum(score.kl for score in scores) / sum(score.tokens for score in scores)


def timings(files: Sequence[tuple[Path, bool]], rows: int, past: int, calls: int) -> list[list[float]]:
    """For each (folder, with the library), seconds of processor time of single calls with `rows` tokens behind `past`
    others; the files take turns, call by call."""
    models = [open_model(*file) for file in files]
    ids = np.random.default_rng(0).integers(100, 1000, (1, past + rows))
    pasts = [model.empty_past(1) for model in models]
    if past:
        pasts = [model.step(ids[:, :past], empty)[1] for model, empty in zip(models, pasts, strict=True)]
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(calls + WARMUP):
        for model, before, spent in zip(models, pasts, seconds, strict=True):
            start = time.process_time()
            model.step(ids[:, past:], before)
            if turn >= WARMUP:
                spent.append(time.process_time() - start)
    return seconds


def price(mine: Sequence[float], other: Sequence[float]) -> float:
    """How many times as long as the other's calls mine take: the median over neighbouring ones."""
    return statistics.median(own / theirs for own, theirs in zip(mine, other, strict=True))


def size_of(folder: Path) -> int:
    """Bytes of graph and weights."""
    return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))


def measure(name: str, work: Path, calls: int) -> list[dict[str, Any]]:
    """Every row of one model's table."""
    files = [(work / entry.folder, entry.library) for entry in ENTRIES]
    rows: list[dict[str, Any]] = [
        {"model": name, "entry": entry.name, "kl": kl_divergence(work, *file), "bytes": size_of(file[0])}
        for entry, file in zip(ENTRIES, files, strict=True)
    ]
    for kind, tokens, past, count in (("decode", 1, PAST, calls), ("prefill", PROMPT, 0, calls // 3)):
        seconds = timings(files, tokens, past, count)
        for row, mine in zip(rows, seconds, strict=True):
            row[kind] = tokens / statistics.median(mine)
            row[f"{kind}_beside"] = 1 / price(mine, seconds[BASE])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table, with everything also as a multiple of the builder's int4."""
    print(f"\n| {rows[0]['model']} | decode, tokens/s | | prefill, tokens/s | | KL | | MB | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        beside = {key: row[key] / rows[BASE][key] for key in ("kl", "bytes")}
        beside |= {key: row[f"{key}_beside"] for key in ("decode", "prefill")}
        cells = [row["entry"]]
        for key, digits, unit in (("decode", 1, 1), ("prefill", 0, 1), ("kl", 4, 1), ("bytes", 1, 1e6)):
            cells += [f"{row[key] / unit:.{digits}f}", f"{beside[key]:.{3 if key in ('kl', 'bytes') else 2}f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="a GGUF file")
    parser.add_argument("--gemma", type=Path, help="a GGUF file")
    parser.add_argument("--calls", type=int, default=60, help="of each kind, a third of that for prefill")
    parser.add_argument("--windows", type=int, default=8, help="of 128 tokens, for the KL divergence")
    parser.add_argument("--work", type=Path, help="a folder for the files, which stay there and are used again")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    models = {"SmolLM2-135M": arguments.smollm2, "Gemma 3 270M": arguments.gemma}
    given = {name: path for name, path in models.items() if path is not None}
    if not given:
        parser.error("give --smollm2 or --gemma")
    torch.set_num_threads(1)  # sessions take as many
    print(f"{json.dumps(describe())}, load {os.getloadavg()[0]:.1f}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="swquant-onnx-") as scratch:
        for name, gguf in given.items():
            work = (arguments.work or Path(scratch)) / name.split()[0].split("-")[0].lower()
            if not (work / "tokens.json").is_file():
                work.mkdir(parents=True)
                make_files(gguf, work)
                write_reference(work, arguments.windows)
            found = measure(name, work, arguments.calls)
            show(found)
            rows += found
            if arguments.json:
                arguments.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
