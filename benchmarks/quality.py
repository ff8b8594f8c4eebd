"""What does compressing without data cost, on real models and real text?

Two small models (SmolLM2 135M and Gemma 3 270M) are compressed by `swquant.compress` in the ways that its
options offer, and held against the original by `swquant.evaluate`: what a user of these two functions gets.

How the numbers are made:

    models     GGUF files whose weights lie on a 4-bit grid already. `grid.py` takes them off it first, and
               checks that they still compute the same function: that is the original of every row
    dtype      the original is float32. Dense tensors and scales are written as bfloat16, as they would be
               for a model published in bfloat16; the row `bfloat16` shows what that alone changes
    text       windows of --window tokens from the beginning of --text, one after the other
    perplexity over all predicted tokens of all windows; KL(original || model) in nats and agreement of
               the most likely token over the same positions
    bits       stored bits per quantized weight, from the manifest: codes, scales, zero points, outliers.
               Embeddings are not rounded, and not counted; MB is everything on disk

A few windows rank methods by KL well and by perplexity roughly: quote both with the number of tokens.
The last rows are the ablation: what a loader sees that ignores the sidecar, one scale for a whole tensor,
and the original with nothing changed but its super weights set to zero. A tensor that holds a super weight
stays dense where its block would be too large to represent it (the plan's safety rule, see `swquant.plan`);
a line below the table says where that happened.

    python benchmarks/quality.py --smollm2 MODEL.gguf --gemma MODEL.gguf
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from grid import break_and_check, write_folder

import swquant
from swquant.checkpoint.open import open_checkpoint

TEXT = Path(__file__).parent.parent / "data" / "wikitext2-excerpt.txt"
SEED = 0
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Setting:
    """One way to compress. options: of `swquant.compress`. stock: also evaluate it with the sidecar ignored."""

    label: str
    options: Mapping[str, Any]
    stock: bool = False


SETTINGS = [
    Setting("4 bits, block 64, min/max asymmetric", {"block": "64", "symmetric": False}),
    Setting("4 bits, block 128 (the default)", {"block": "128"}, stock=True),
    Setting("4 bits, block 64", {"block": "64"}),
    Setting("4 bits, channel", {"block": "channel"}),
    Setting("4 bits, block 128, outliers 0.0005", {"block": "128", "outliers": 0.0005}),
    Setting("8 bits, channel", {"bits": 8, "block": "channel"}),
    Setting("3 bits, block 64", {"bits": 3, "block": "64"}),
    Setting("4 bits, tensor", {"block": "tensor"}),
    Setting("4 bits, tensor, outliers 0.0005", {"block": "tensor", "outliers": 0.0005}, stock=True),
]


@dataclass(frozen=True)
class Row:
    """A line of the table. None: does not apply. notes: what the plan did that the label does not say."""

    label: str
    bits: float | None
    perplexity: float
    kl: float | None
    top1: float | None
    nbytes: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """What is evaluated: `windows` windows of `window` tokens."""

    text: str
    window: int
    windows: int


def evaluate(label: str, model: Path, original: Path, text: Text, **record: Any) -> Row:
    """record: bits, nbytes and notes, as far as the label has them; restore, as `swquant.evaluate` takes it."""
    restore = record.pop("restore", True)
    result = swquant.evaluate(model, text.text, original, window=text.window, limit=text.windows, restore=restore)
    values = {"bits": None, "nbytes": None} | record
    return Row(label, perplexity=result.perplexity, kl=result.kl, top1=result.top1, **values)


def notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What the plan did with this setting that is not plain from its name."""
    dense = [
        name
        for name, record in manifest["tensors"].items()
        if record.get("dense", "").startswith("holds a super weight")
    ]
    rule = [f"{len(dense)} dense for a super weight: {', '.join(dense)}"] if dense else []
    return (*manifest["notes"], *rule)


def compressed_rows(setting: Setting, original: Path, folder: Path, text: Text) -> Iterator[Row]:
    result = swquant.compress(original, folder, overwrite=True, dtype=DTYPE, **setting.options)
    totals = result.manifest["totals"]
    size = {"bits": totals["bits_per_quantized_weight"], "nbytes": totals["bytes"]}
    yield evaluate(setting.label, folder, original, text, **size, notes=notes(result.manifest))
    if setting.stock:
        yield evaluate("  the same, sidecar ignored", folder, original, text, **size, restore=False)


def changed_copy(original: Path, folder: Path, dtype: torch.dtype, points: list[Mapping[str, Any]]) -> Path:
    """The original in another dtype, with the weights of `points` (name, row, col) set to zero."""
    with open_checkpoint(original) as checkpoint:
        tensors = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
        for point in points:
            tensors[point["name"]][point["row"], point["col"]] = 0
        return write_folder(tensors, checkpoint, folder)


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows_of(original: Path, scratch: Path, text: Text) -> Iterator[Row]:
    """Every line of a model's table, as it is measured."""
    result = swquant.evaluate(original, text.text, window=text.window, limit=text.windows)
    yield Row("original, float32", 32.0, result.perplexity, None, None, disk(original))
    plain = changed_copy(original, scratch / "plain", torch.bfloat16, [])
    yield evaluate("bfloat16, nothing rounded", plain, original, text, bits=16.0, nbytes=disk(plain))
    shutil.rmtree(plain)
    for setting in SETTINGS:
        yield from compressed_rows(setting, original, scratch / "compressed", text)
    points = swquant.inspect(scratch / "compressed")["detection"]["super_weights"]
    pruned = changed_copy(original, scratch / "pruned", torch.float32, points)
    where = tuple(f"{point['name']}[{point['row']}, {point['col']}] = {point['value']:g} set to 0" for point in points)
    yield evaluate(f"original, {len(points)} super weights pruned", pruned, original, text, bits=32.0, notes=where)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_row(row: Row) -> None:
    size = None if row.nbytes is None else row.nbytes / 1e6
    perplexity = format(row.perplexity, ".2f" if row.perplexity < 1e5 else ".2e")
    top1 = None if row.top1 is None else 100 * row.top1
    cells = f"{number(row.bits, '.3f'):>7} {perplexity:>11} {number(row.kl, '.4f'):>9} {number(top1, '.1f'):>7}"
    print(f"{row.label:40} {cells} {number(size, '.1f'):>8}", flush=True)


def report(gguf: Path, scratch: Path, text: Text) -> dict[str, Any]:
    """Break one model's grid, measure and print its table, and return it as JSON objects."""
    original = scratch / gguf.stem
    start = time.perf_counter()
    _, difference = break_and_check(gguf, original, SEED)
    with open_checkpoint(original) as checkpoint:
        weights = sum(stored.numel for stored in checkpoint.tensors.values())
    print(
        f"\n{gguf.stem}, {weights / 1e6:.0f} million weights, off its grid; largest difference of a logit {difference:.1e}"
    )
    print(f"{'setting':40} {'bits':>7} {'perplexity':>11} {'KL':>9} {'top-1 %':>7} {'MB':>8}", flush=True)
    rows: list[Row] = []
    for row in rows_of(original, scratch, text):
        print_row(row)
        rows.append(row)
    for note in dict.fromkeys(f"{row.label.strip()}: {note}" for row in rows for note in row.notes):
        print(f"  {note}")
    seconds = time.perf_counter() - start
    print(f"  {seconds:.0f} s", flush=True)
    return {"model": gguf.stem, "difference": difference, "rows": [asdict(row) for row in rows], "seconds": seconds}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "transformers")} | {"swquant": swquant.__version__}
    cpu = models[0] if models else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity, KL and size of compressed models, setting by setting.")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="SmolLM2-135M-Instruct")
    parser.add_argument("--gemma", type=Path, metavar="GGUF", help="Gemma 3 270M")
    parser.add_argument("--text", type=Path, metavar="FILE", default=TEXT, help="default: data/wikitext2-excerpt.txt")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="windows of text (default: 4)")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per window (default: 1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    options = parser.parse_args()
    models = [path for path in (options.smollm2, options.gemma) if path]
    if not models:
        parser.error("give --smollm2, --gemma or both")
    if missing := [path for path in (*models, options.text) if not path.is_file()]:
        parser.error(f"{missing[0]}: no such file")

    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {versions}")
    print(f"python {shlex.join(sys.argv)}")
    text = Text(options.text.read_text(encoding="utf-8"), options.window, options.windows)
    print(f"{options.text.name}, {text.windows} windows of {text.window} tokens; dense tensors and scales in {DTYPE}")
    results = []
    for path in models:
        with tempfile.TemporaryDirectory(prefix="swquant-quality-") as scratch:
            results.append(report(path, Path(scratch), text))
    if options.json:
        content = {"machine": facts, "text": options.text.name, "windows": text.windows, "window": text.window}
        options.json.write_text(json.dumps(content | {"models": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
