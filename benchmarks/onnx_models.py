"""Our ONNX files beside those of onnxruntime-genai's builder: speed, size, and KL divergence from the original, in one run.

    python benchmarks/onnx_models.py --smollm2 MODEL.gguf [--gemma MODEL.gguf] [--threads 2] [--rounds 5] [--cpu-time]

The model's stored grid is broken first (grid.py). Then, from the same float32 weights:

    builder fp32       the builder's graph as it is
    builder int4       the builder's own quantization: 4 bits, blocks of 32, accuracy level 4, output head of 8 bits,
                       rounded to nearest or with its k_quant
    ours, level 0      4 bits, blocks of 32, output head of 8 bits, outliers; sums in float
    ours, level 4      the same with activations in int8, and the massive channels kept in float
    ours, best         as level 4, compressed with --preset best: the model's own text decides how weights are rounded

The head is tied to the embedding in both models, so both sides store one table of 8 bits for both. Ours run on the operator
library, and again on a stock runtime through the function that the file carries. Every measurement is a process of its
own; files take turns, round by round. A process warms up and times single calls: one token behind 32 others (decode), 64
tokens behind none (prefill). Reported are medians over all calls of all rounds. KL divergence, in nats, is the mean over
the tokens of WikiText-2's excerpt in windows of 128, against the original in torch.
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
from exporters.onnx.genai import fix_cache_shapes
from exporters.onnx.write import MODEL, save
from swquant.checkpoint.open import open_checkpoint
from swquant.evaluation import Score, make_windows, score_window, window_logits
from swquant.models import build_model
from swquant.onnx_graph import adapt_config
from swquant.onnx_model import OnnxModel
from swquant.ort import open_session

TEXT = Path(__file__).parent.parent / "data/wikitext2-excerpt.txt"
WINDOW, PAST, PROMPT = 128, 32, 64
BUILDER = (
    "hf_token=false",
    "windowed_kv_cache=false",
)  # as in our graphs: the cache grows with the text in every layer
SECONDS = 2.0  # of timing, for either kind of call in a process


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
    Entry("ours, best, level 4, library", "best4", library=True),
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
        # The builder's default method is rtn under another name, but with a head of 8 bits it writes an invalid graph (0.18).
        choice = (f"algo_config={method}", "matmul_mixed_precision=last_matmul:int8")
        build(source, work / folder, "-p", "int4", "--extra_options", *BUILDER, *choice)
    shutil.rmtree(source)
    for preset, folder, levels in (("balanced", "level", (0, 4)), ("best", "best", (4,))):
        checkpoint = swquant.compress(work / "model", work / preset, bits=4, block="32", preset=preset).path
        for level in levels:
            out = work / f"{folder}{level}"
            swquant.export(checkpoint, out, graph="genai", accuracy_level=level, lm_head_bits=8)


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


def timings(folder: Path, library: bool, cpu_time: bool) -> dict[str, list[float]]:
    """Seconds of single calls, in this process."""
    model = open_model(folder, library)
    clock = time.process_time if cpu_time else time.perf_counter
    rng = np.random.default_rng(0)
    _, past = model.step(rng.integers(100, 1000, (1, PAST)), model.empty_past(1))
    calls = {"decode": (1, past), "prefill": (PROMPT, model.empty_past(1))}
    seconds: dict[str, list[float]] = {}
    for name, (rows, before) in calls.items():
        ids = rng.integers(100, 1000, (1, rows))
        for _ in range(3):
            model.step(ids, before)
        seconds[name] = []
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(seconds[name]) < 5:
            start = clock()
            model.step(ids, before)
            seconds[name].append(clock() - start)
    return seconds


def apart(what: str, *words: Any) -> Any:
    """One of the two functions above, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([what, *words])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def run_one(text: str) -> None:
    what, threads, *words = json.loads(text)
    torch.set_num_threads(threads)  # sessions take as many
    if what == "kl":
        work, folder, library = words
        print(json.dumps(kl_divergence(Path(work), Path(work) / folder, library)))
    else:
        folder, library, cpu_time = words
        print(json.dumps(timings(Path(folder), library, cpu_time)))


def size_of(folder: Path) -> int:
    """Bytes of graph and weights."""
    return sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))


def measure(name: str, work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row of one model's table."""
    calls: dict[str, dict[str, list[float]]] = {entry.name: {"decode": [], "prefill": []} for entry in ENTRIES}
    for turn in range(arguments.rounds):
        for entry in ENTRIES[turn % len(ENTRIES) :] + ENTRIES[: turn % len(ENTRIES)]:
            folder = str(work / entry.folder)
            for kind, seconds in apart("time", arguments.threads, folder, entry.library, arguments.cpu_time).items():
                calls[entry.name][kind] += seconds
    rows = []
    for entry in ENTRIES:
        decode, prefill = (statistics.median(calls[entry.name][kind]) for kind in ("decode", "prefill"))
        rows.append(
            {
                "model": name,
                "entry": entry.name,
                "decode": 1 / decode,
                "prefill": PROMPT / prefill,
                "kl": apart("kl", arguments.threads, str(work), entry.folder, entry.library),
                "bytes": size_of(work / entry.folder),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table, with everything also as a multiple of the builder's int4."""
    base = next(row for row in rows if row["entry"].startswith("builder int4"))
    print(f"\n| {rows[0]['model']} | decode, tokens/s | | prefill, tokens/s | | KL | | MB | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [row["entry"]]
        for key, digits, unit in (("decode", 1, 1), ("prefill", 0, 1), ("kl", 4, 1), ("bytes", 1, 1e6)):
            cells += [f"{row[key] / unit:.{digits}f}", f"{row[key] / base[key]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="a GGUF file")
    parser.add_argument("--gemma", type=Path, help="a GGUF file")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help="of 128 tokens, for the KL divergence")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that is not idle")
    parser.add_argument("--work", type=Path, help="a folder for the files, which stay there and are used again")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one)
        return
    if arguments.cpu_time and arguments.threads > 1:
        parser.error("--cpu-time adds up the time of all threads; it needs --threads 1")
    models = {"SmolLM2-135M": arguments.smollm2, "Gemma 3 270M": arguments.gemma}
    given = {name: path for name, path in models.items() if path is not None}
    if not given:
        parser.error("give --smollm2 or --gemma")
    clock = "processor time" if arguments.cpu_time else "wall clock"
    print(f"{json.dumps(describe())}\n{arguments.threads} thread(s), {clock}, load {os.getloadavg()[0]:.1f}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="swquant-onnx-") as scratch:
        for name, gguf in given.items():
            work = (arguments.work or Path(scratch)) / name.split()[0].split("-")[0].lower()
            if not (work / "tokens.json").is_file():
                work.mkdir(parents=True)
                make_files(gguf, work)
                write_reference(work, arguments.windows)
            found = measure(name, work, arguments)
            show(found)
            rows += found
    if arguments.json:
        record = {"machine": describe(), "threads": arguments.threads, "clock": clock, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
