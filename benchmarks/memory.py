"""How much memory does compressing take, on a model much larger than that?

The promise: reading, rounding, writing and verifying a checkpoint stays within 1 GiB plus three times its
largest tensor, however many tensors there are. It is checked on a llama of 3 billion parameters in bfloat16
that this script makes: the layers of Llama 3.2 3B with a vocabulary of 32,000, because a larger vocabulary would
only raise the bound. Three processes, one after the other:

    weight pass           plan, write, verify: 4 bits, block 128
    with a sidecar        the same, and one weight in 2,000 kept exactly
    detection             the probe with one module's weights in memory at a time (--low-memory). Not part of
                          the promise: it runs in float32, and maps the shards instead of reading them

How the numbers are made:

    weights     random, made and written tensor by tensor, in shards of 1 GB; the same in every run
    process     each row is a fresh Python process that does nothing else
    peak        the most that was ever resident in it (VmHWM), everything included: interpreter, libraries, every
                page of a mapped file. Not: files in the kernel's page cache, which belong to no process
    private     the most of it that no file backs (RssAnon, looked at 200 times a second). The rest are
                libraries and mapped shards, which the kernel takes back when it needs the memory
    imports     the same after importing torch, transformers and swquant, before the checkpoint is opened. It is
                part of the peak, and of what the bound allows
    tensor      the largest tensor as stored

The exit status is 1 if the bound does not hold. Linux only: other systems do not tell these numbers.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import swquant
from exporters.safetensors_file import SafetensorsWriter
from swquant.detect.prompt import DEFAULT_PROMPT

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 3072, 8192, 28, 24, 8, 32_000
SHARD = 10**9
SEED = 0
GIB = 2**30

Shape = tuple[int, ...]


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=1,
    )


def tensors(layers: int) -> dict[str, Shape]:
    """Name -> shape of everything that is stored, in a checkpoint's usual order."""
    kv = HIDDEN * KV_HEADS // HEADS
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    norms: dict[str, Shape] = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in (linears | norms).items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def size(shape: Shape) -> int:
    return torch.Size(shape).numel() * torch.bfloat16.itemsize


def shards(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    files: list[dict[str, Shape]] = [{}]
    for name, shape in shapes.items():
        if sum(map(size, files[-1].values())) + size(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    return files


def make_model(folder: Path, layers: int) -> None:
    """config.json, tokenizer, index and shards; one tensor in memory at a time."""
    config(layers).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "</s>", *DEFAULT_PROMPT.replace(".", " .").split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)

    generator = torch.Generator().manual_seed(SEED)
    files, weight_map = shards(tensors(layers)), {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        print(f"making {name}", file=sys.stderr)
        layout = [(key, torch.bfloat16, shape) for key, shape in shapes.items()]
        writer = SafetensorsWriter(folder / name, layout, {"format": "pt"})
        for key, shape in shapes.items():
            if len(shape) == 1:
                writer.write(key, torch.ones(shape, dtype=torch.bfloat16))
            else:
                writer.write(key, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        writer.finish()
        weight_map |= dict.fromkeys(shapes, name)
    total = sum(map(size, tensors(layers).values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def compress(model: Path, out: Path, **options: Any) -> None:
    swquant.compress(model, out, low_memory=True, **options)


def probe(model: Path, out: Path) -> None:
    swquant.detect(model, low_memory=True)


# Row -> what it runs.
WORK: dict[str, Callable[[Path, Path], object]] = {
    "compress": compress,
    "--refine none": lambda model, out: compress(model, out, refine="none"),
    "detect": probe,
}


def resident(field: str) -> int:
    """Bytes of this process: VmHWM, the most that was ever resident, or RssAnon, what is and no file backs.

    Not getrusage: its maximum is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_here(row: str, model: Path, out: Path) -> None:
    """Do the work of a row in this process and print what it took, as JSON."""
    private, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            private[0] = max(private[0], resident("RssAnon"))

    imports, start = resident("VmHWM"), time.perf_counter()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    WORK[row](model, out)
    done.set()
    watcher.join()
    seconds = time.perf_counter() - start
    print(json.dumps({"imports": imports, "peak": resident("VmHWM"), "private": private[0], "seconds": seconds}))


def measure(row: str, model: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    print(f"measuring: {row}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        command = [sys.executable, __file__, "--measure", row, os.fspath(model), os.fspath(Path(folder) / "out")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{row}: failed with status {done.returncode}, see above")
    return dict(json.loads(done.stdout))


def check_space(folder: Path, model_bytes: int) -> None:
    needed, free = model_bytes * 3 // 2, shutil.disk_usage(folder).free  # the model and its compressed copy
    if free < needed:
        sys.exit(
            f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; use --folder, or a smaller --scale"
        )


def report(model: Path, layers: int) -> bool:
    """Measure every row and print the table. Returns whether the bound holds."""
    sizes = {name: size(shape) for name, shape in tensors(layers).items()}
    largest = max(sizes.values())
    bound = GIB + 3 * largest
    count = sum(sizes.values()) // torch.bfloat16.itemsize
    print(
        f"llama, {count / 1e9:.2f} billion weights, bfloat16, {sum(sizes.values()) / 1e9:.2f} GB, {len(sizes)} tensors"
    )
    print(f"bound: 1 GiB + 3 x {largest / 1e6:.0f} MB (largest tensor) = {bound / 1e6:.0f} MB\n", flush=True)
    rows, holds = [], True
    for row in WORK:
        result = measure(row, model)
        within = result["peak"] <= bound
        holds &= within
        megabytes = [result[key] / 1e6 for key in ("imports", "peak", "private")]
        rows.append((row, *megabytes, "yes" if within else "NO", result["seconds"]))
    print(f"| {'work':14} | imports, MB | peak, MB | private, MB | within the bound | seconds |")
    print(f"|{'-' * 16}|------------:|---------:|------------:|:----------------:|--------:|")
    for row, imports, most, private, verdict, seconds in rows:
        print(f"| {row:14} | {imports:11.0f} | {most:8.0f} | {private:11.0f} | {verdict:^16} | {seconds:7.0f} |")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure the memory that compressing a 3-billion-parameter model takes."
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the model is made, on a disk"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="part of the 28 layers to make; tensors keep their size"
    )
    parser.add_argument("--keep", action="store_true", help="do not remove the model afterwards")
    parser.add_argument("--measure", nargs=3, metavar=("ROW", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        row, model, out = options.measure
        measure_here(row, Path(model), Path(out))
        return
    if not Path("/proc/self/status").exists():
        sys.exit("needs /proc/self/status, which only Linux has")
    layers = round(LAYERS * options.scale)
    if not 1 <= layers <= LAYERS:
        parser.error(f"--scale must be between {1 / LAYERS:.2f} and 1")
    check_space(options.folder, sum(map(size, tensors(layers).values())))
    folder = Path(tempfile.mkdtemp(prefix="swquant-memory-", dir=options.folder))
    try:
        model = folder / "llama"
        model.mkdir()
        make_model(model, layers)
        holds = report(model, layers)
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if not holds:
        sys.exit("the bound does not hold")


if __name__ == "__main__":
    main()
