"""INT8 activations on ONNX Runtime: what keeping massive channels in float gains, and what it costs per token.

    python benchmarks/activations_onnx.py --smollm2 MODEL.gguf [--gemma MODEL.gguf] [--calls 100]

The model's stored grid is broken first (grid.py). Then W8A8 (one scale per row) and W4A8 (blocks of 128) are compressed
with --activations int8 and exported three times, with the graph of genai's builder:

    level 0          activations in float: what the two others are compared with
    level 4, plain   activations in int8, no channel kept
    level 4, kept    the channels that the checkpoint names, in float

KL divergence, in nats, is that of level 0's predictions from the others', mean and median over the tokens of
WikiText-2's excerpt in windows of 128: the weights are the same, so nothing but the rounding of activations is in it.
The median is there because a single token can outweigh all others. Files run on the operator library, and again on a
stock runtime through the function that they carry: level 4, plain, on the stock runtime is what ONNX Runtime's
MatMulNBits does without swquant, and KL is given as a share of that. Times are of one token behind 32 others, on one
thread, in processor time: the five take turns call by call, and the price of channels is the median of the quotients of
neighbouring calls, so what else the machine does hits both sides alike. The output head, most of a small model's
weights, has 8 bits in all three files. --kl-only leaves out the times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import break_and_check
from machine import describe
from onnx_models import PAST, TEXT, WINDOW, open_model, price, timings
from torch import Tensor

import swquant
from exporters.json_file import read_json
from swquant.checkpoints.manifest import MANIFEST, write_manifest
from swquant.checkpoints.open import open_checkpoint
from swquant.evaluate.pipeline import make_windows, window_logits

VARIANTS = ("level 0", "level 4, plain", "level 4, kept")
# Level 0 on a stock runtime is left out: its kernel for the head's 8 bits in float takes minutes.
RUNS = ((VARIANTS[0], True), (VARIANTS[1], False), (VARIANTS[1], True), (VARIANTS[2], False), (VARIANTS[2], True))
Row = dict[str, Any]


def without_channels(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose manifest keeps no channel of any input."""
    shutil.copytree(checkpoint, folder)
    manifest = read_json(folder / MANIFEST)
    for record in manifest["tensors"].values():
        if "inputs" in record:
            record["inputs"] |= {"channels": [], "peaks": []}
    write_manifest(
        folder, {key: value for key, value in manifest.items() if key not in ("format", "version", "digest")}
    )
    return folder


def make_files(source: Path, bits: int, work: Path) -> None:
    """The three folders, named as in VARIANTS."""
    kept = swquant.compress(source, work / "kept", bits=bits, activations="int8").path
    plain = without_channels(kept, work / "plain")
    for name, checkpoint, level in zip(VARIANTS, (kept, plain, kept), (0, 4, 4), strict=True):
        swquant.export(checkpoint, work / name, graph="genai", accuracy_level=level, lm_head_bits=8)


def write_reference(source: Path, work: Path, windows: int) -> None:
    """Level 0's logits on the text, one file for each window, and its tokens."""
    model = open_model(work / VARIANTS[0], library=True)
    with open_checkpoint(source) as checkpoint:
        pieces = make_windows(checkpoint, TEXT.read_text(), WINDOW, windows)
    for index, ids in enumerate(pieces.ids):
        np.save(work / f"logits{index}.npy", window_logits(model, ids, pieces.bos)[0].numpy())
    tokens = {"bos": pieces.bos, "ids": [ids.tolist() for ids in pieces.ids]}
    (work / "tokens.json").write_text(json.dumps(tokens))


def divergences(work: Path, variant: str, library: bool) -> Tensor:
    """KL of every predicted token."""
    model, tokens = open_model(work / variant, library), json.loads((work / "tokens.json").read_text())
    found = []
    for index, ids in enumerate(tokens["ids"]):
        logits, _ = window_logits(model, torch.tensor(ids), tokens["bos"])
        theirs = torch.from_numpy(np.load(work / f"logits{index}.npy")).log_softmax(dim=-1)
        found.append((theirs.exp() * (theirs - logits.log_softmax(dim=-1))).sum(dim=-1))
    return torch.cat(found)


def measure(key: str, bits: int, gguf: Path, work: Path, arguments: argparse.Namespace) -> list[Row]:
    if not (work / "tokens.json").is_file():
        break_and_check(gguf, work / "model")
        make_files(work / "model", bits, work)
        write_reference(work / "model", work, arguments.windows)
    inputs = [record["inputs"] for record in swquant.inspect(work / "kept")["tensors"].values() if "inputs" in record]
    counts = {"linears": len(inputs), "with_channels": sum(bool(record["channels"]) for record in inputs)}
    rows: list[Row] = []
    for variant, library in RUNS:
        kl = divergences(work, variant, library)
        found = {"kl": float(kl.mean()), "median": float(kl.median()), "largest": float(kl.max())}
        rows.append({"model": key, "weights": f"W{bits}", "variant": variant, "library": library, **counts, **found})
    if arguments.kl_only:
        return rows
    files = [(work / variant, library) for variant, library in RUNS]
    seconds = dict(zip(RUNS, timings(files, 1, PAST, arguments.calls), strict=True))
    for row in rows:
        mine = seconds[row["variant"], row["library"]]
        row["decode_ms"] = 1000 * statistics.median(mine)
        if row["variant"] == VARIANTS[2]:
            row["price"] = price(mine, seconds[VARIANTS[1], row["library"]])
    return rows


def show(rows: list[Row]) -> None:
    print(
        "\n| model | activations | runtime | KL, mean | median | largest | beside stock: mean | median | ms per token | price |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        same = {name: row[name] for name in ("model", "weights")}
        plain = next(item for item in rows if {**item, **same, "variant": VARIANTS[1], "library": False} == item)
        shares = [f"{row[name] / plain[name]:.2f}" for name in ("kl", "median")]
        decode = f"{row['decode_ms']:.2f}" if "decode_ms" in row else ""
        price = f"{row['price'] - 1:+.1%}" if "price" in row else ""
        runtime = "operator library" if row["library"] else "stock"
        print(
            f"| {row['model']} {row['weights']}A8 | {row['variant']} | {runtime} | {row['kl']:.4f} | {row['median']:.4f} "
            f"| {row['largest']:.2f} | {' | '.join(shares)} | {decode} | {price} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="INT8 activations on ONNX Runtime.")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="SmolLM2-135M-Instruct")
    parser.add_argument("--gemma", type=Path, metavar="GGUF", help="Gemma 3 270M")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[8, 4])
    parser.add_argument("--calls", type=int, default=100, help="of each kind, for the times")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--kl-only", action="store_true")
    parser.add_argument("--work", type=Path, help="a folder for the files, which stay there and are used again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sessions take as many
    rows: list[Row] = []
    for key in ("smollm2", "gemma"):
        if (gguf := getattr(arguments, key)) is None:
            continue
        for bits in arguments.bits:
            with tempfile.TemporaryDirectory(prefix="swquant-activations-") as scratch:
                work = (arguments.work or Path(scratch)) / f"{key}-w{bits}a8"
                work.mkdir(parents=True, exist_ok=True)
                rows += measure(key, bits, gguf, work, arguments)
            if arguments.json:
                options = {"windows": arguments.windows, "calls": arguments.calls}
                content = {"machine": describe(), "options": options, "results": rows}
                arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
