"""How long does a model of 8 to 671 billion weights take, on how many machines, and what bounds it?

Nobody runs `--preset best` on 405 billion weights to find out. So every stage is measured here on one layer of moderate
size, in processor time per unit of its work, and the work of real models is counted:

    read        bytes      a tensor from the file's cached pages (what a disk takes is added: --disk)
    cast        weights    bfloat16 to float32, once for every pass of a model that is larger than memory
    product     x weight   one token through one weight; of the text that is written, 16 tokens at a time
    gram        tokens x in^2    of every input that weights read
    factor      in^3       Cholesky, inverse, Cholesky, in place
    search      weights    scales with importance
    feedback    in^2 x out
    write       weights    pack, hash, write

    passes      the probe and its ablations 4, the text 255 (one per token, all texts at once), reading it 1

What one process must do is the passes: a layer needs what the one before it gave. Everything else divides among
workers, by layer (the table for several workers is a plan: today there is one). A worker here is one core;
memory is 1 GiB + three times the largest layer + the texts' keys and values. Experts are searched with the prompt's
energy, without Gram matrices and one at a time, and a text of 16 tokens at a time visits the part of them that the
table counts.

The readings of files are checked by a run: --sparse 100 makes shards of 100 GB with the headers of the 70B model and
no data on the disk, opens them, and reads every tensor. The kernel makes the zeros; our reader is timed.

    python benchmarks/scale.py
    python benchmarks/scale.py --sparse 100 --folder DISK
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from calibrationless import Group, damping_for, feed_back, inverse_factor_, quantize
from exporters.layouts import to_tensors
from exporters.safetensors_file import SafetensorsWriter
from swquant.checkpoints.safetensors import SafetensorsCheckpoint

TEXTS, LENGTH, PASSES_OF_PROBE = 16, 256, 4
GIB = 2**30
STAGES = ("read", "cast", "product", "gram", "factor", "search", "feedback", "write")


@dataclass(frozen=True)
class Model:
    """layers of matrices (out, in); experts: weights of all of them in all layers, and the part that 16 tokens visit.
    others: weights outside the layers. keys: channels of a token's keys and values in a layer."""

    name: str
    layers: int
    matrices: tuple[tuple[int, int], ...]
    others: int
    keys: int
    experts: int = 0
    visited: float = 1.0

    @property
    def dense(self) -> int:
        return self.layers * sum(rows * cols for rows, cols in self.matrices)

    @property
    def weights(self) -> int:
        return self.dense + self.experts + self.others

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of the inputs of one layer that have a Gram matrix: q, k and v share one, and so do gate and up."""
        return tuple(dict.fromkeys(self.matrices[index][1] for index in (0, -1))) + (self.matrices[3][1],) * 2


def llama(name: str, layers: int, hidden: int, inner: int, keys: int, vocabulary: int = 128_256) -> Model:
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    mlp = ((inner, hidden), (inner, hidden), (hidden, inner))
    return Model(name, layers, attention + mlp, 2 * vocabulary * hidden, 2 * keys)


# DeepSeek-V3: 58 layers of 256 experts of 3 x 7168 x 2048; 128 choices of 16 tokens visit 1 - (255/256)^128 of them.
MODELS = (
    llama("8B", 32, 4096, 14336, 1024),
    llama("70B", 80, 8192, 28672, 1024),
    llama("405B", 126, 16384, 53248, 1024),
    Model(
        "671B mixture",
        61,
        ((1536, 7168), (576, 7168), (24576, 1536), (7168, 16384), (2048, 7168), (2048, 7168), (7168, 2048)),
        2 * 129_280 * 7168,
        128 * (192 + 128),
        experts=58 * 256 * 3 * 7168 * 2048,
        visited=1 - (255 / 256) ** 128,
    ),
)


def cost(work: Callable[[], object], units: float, rounds: int = 3) -> float:
    """Nanoseconds of processor time per unit, the best of some."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return 1e9 * min(spent) / units


def measure(folder: Path, out: int, inputs: int) -> dict[str, float]:
    """Stage -> nanoseconds per unit, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs, generator=generator).to(torch.bfloat16)
    make_shards(folder, {"model.layers.0.mlp.down_proj.weight": (out, inputs)}, weight)
    x, text = torch.randn(1024, inputs, generator=generator), torch.randn(16, inputs, generator=generator)
    block, wide = Group(128), weight.to(torch.float32)
    gram = x.T @ x
    importance = gram.diagonal().clone()
    quantized = quantize(weight, block, 4, importance=importance)
    factor = inverse_factor_(gram.clone(), damping_for(1024))
    layout = {name: (part.dtype, tuple(part.shape)) for name, part in to_tensors(quantized).items()}

    def write() -> None:
        writer = SafetensorsWriter(folder / "out.safetensors", [(k, *form) for k, form in layout.items()], {})
        for name, part in to_tensors(quantized).items():
            writer.write(name, part)
        writer.finish()

    checkpoint = SafetensorsCheckpoint(folder)
    (name,) = checkpoint.tensors
    numel = out * inputs
    return {
        "read": cost(lambda: checkpoint.read(name), 2 * numel),
        "cast": cost(lambda: weight.to(torch.float32), numel),
        "product": cost(lambda: text @ wide.T, numel * len(text)),
        "gram": cost(lambda: x.T @ x, len(x) * inputs**2),
        "factor": cost(lambda: inverse_factor_(gram.clone(), damping_for(1024)), inputs**3),
        "search": cost(lambda: quantize(weight, block, 4, importance=importance), numel),
        "feedback": cost(lambda: feed_back(weight, quantized, factor), inputs**2 * out, rounds=1),
        "write": cost(write, numel),
    }


def hours(model: Model, each: dict[str, float], workers: int, disk: float) -> dict[str, float]:
    """Stage -> hours. disk: bytes per second that all workers together get."""
    tokens = TEXTS * LENGTH
    active = model.dense + model.others + model.experts * model.visited
    used = model.dense + model.others + model.experts * 8 / 256
    passes = PASSES_OF_PROBE + LENGTH - 1
    per_pass = 2 * each["read"] + each["cast"]
    square = model.layers * sum(width**2 for width in model.inputs)
    cube = model.layers * sum(width**3 for width in model.inputs)
    fed = model.layers * sum(rows * cols**2 for rows, cols in model.matrices)
    serial = {
        "probe": PASSES_OF_PROBE * active * per_pass,
        "text": (LENGTH - 1) * (active * per_pass + TEXTS * used * each["product"]),
        "pass": model.weights * per_pass + tokens * used * each["product"],
    }
    shared = {
        "gram": tokens * square * each["gram"],
        "factor": cube * each["factor"],
        "search": (model.dense + model.experts) * (each["search"] + 2 * each["read"]),
        "feedback": fed * each["feedback"],
        "write": model.weights * each["write"],
    }
    spent = serial | {stage: time / workers for stage, time in shared.items()}
    of_disk = 2e9 * (passes * active + 2 * model.weights) / disk
    return {stage: time / 3.6e12 for stage, time in (spent | {"disk": of_disk}).items()}


def memory(model: Model) -> float:
    """Bytes that a worker may take: the bound."""
    layer = 2 * max(model.dense / model.layers, model.others / 2)
    return GIB + 3 * layer + TEXTS * LENGTH * model.layers * model.keys * 4


def tables(each: dict[str, float], disk: float) -> str:
    lines = ["| stage | unit | ns per unit, one core |", "|---|---|---:|"]
    units = ("byte", "weight", "token x weight", "token x in^2", "in^3", "weight", "in^2 x out", "weight")
    lines += [f"| {stage} | {unit} | {each[stage]:.4f} |" for stage, unit in zip(STAGES, units, strict=True)]
    lines += ["", f"Hours, files at {disk / 1e9:g} GB/s in all; a worker is one core.", ""]
    columns = ("probe", "text", "pass", "gram", "factor", "search", "feedback", "write", "disk")
    lines += [
        f"| model | workers | memory, GB | {' | '.join(columns)} | most |",
        f"|---|---:|---:|{'---:|' * len(columns)}---|",
    ]
    for model in MODELS:
        for workers in (1, 8, 64):
            spent = hours(model, each, workers, disk)
            numbers = " | ".join(
                f"{spent[stage]:.2f}" if spent[stage] < 10 else f"{spent[stage]:.0f}" for stage in columns
            )
            most = max(spent, key=spent.__getitem__)
            lines.append(f"| {model.name} | {workers} | {memory(model) / 1e9:.1f} | {numbers} | {most} |")
    return "\n".join(lines)


def make_shards(folder: Path, shapes: dict[str, tuple[int, int]], weight: torch.Tensor | None = None) -> None:
    """A folder that opens as a model: shards of 5 GB, their data only a length unless `weight` is given."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    shards: list[dict[str, tuple[int, int]]] = [{}]
    for name, (rows, cols) in shapes.items():
        if sum(2 * a * b for a, b in shards[-1].values()) + 2 * rows * cols > 5e9:
            shards.append({})
        shards[-1][name] = (rows, cols)
    where = {}
    for number, content in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(content, shard)
        header, end = {}, 0
        for name, shape in content.items():
            start, end = end, end + 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(folder / shard, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if weight is not None:
                file.write(weight.view(torch.uint8).numpy().tobytes())
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_sparse(folder: Path, gigabytes: float) -> str:
    """Open and read shards with the 70B model's tensors."""
    model, shapes, size = MODELS[1], {}, 0
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    for layer in range(model.layers):
        for part, shape in zip(parts, model.matrices, strict=True):
            if size + 2 * shape[0] * shape[1] <= gigabytes * 1e9:
                shapes[f"model.layers.{layer}.{part}_proj.weight"] = shape
                size += 2 * shape[0] * shape[1]
    make_shards(folder, shapes)
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    start = time.process_time()
    checkpoint = SafetensorsCheckpoint(folder)
    opened, wall = time.process_time(), time.perf_counter()
    for name in checkpoint.tensors:
        assert not bool(checkpoint.read(name)[0, 0])
    spent, elapsed = time.process_time() - opened, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{size / 1e9:.1f} GB in {len(shapes)} tensors, {on_disk / 1e6:.1f} MB on the disk: opened in "
        f"{opened - start:.2f} s, read in {spent:.0f} s of processor time ({1e9 * spent / size:.3f} ns per byte, "
        f"{size / spent / 1e9:.2f} GB/s; {elapsed:.0f} s by the clock), peak {peak / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of large models, from measured stages.")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the files it makes")
    parser.add_argument("--disk", type=float, default=2.0, help="GB per second that files are read with, in all")
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"), help="of the layer")
    parser.add_argument("--sparse", type=float, default=0, metavar="GB", help="read sparse shards of so many GB, too")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="swquant-scale-", dir=given.folder))
    try:
        if given.sparse:
            (folder / "sparse").mkdir()
            print(read_sparse(folder / "sparse", given.sparse), flush=True)
        (folder / "layer").mkdir()
        print(tables(measure(folder / "layer", *given.size), given.disk * 1e9))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
