"""How much memory does compressing take, on a model much larger than that?

The promise: `swquant compress --low-memory` stays within 1 GiB plus three times the largest tensor, however many
tensors there are: the probe, the rehearsal, rounding, writing and verifying included. With --preset best it is three
times the largest *layer*, and what the texts that the model writes hold themselves: hidden states, keys and values. It
is checked on models that this script makes, of random weights in bfloat16:

    llama       3 billion weights: the layers of Llama 3.2 3B with a vocabulary of 32,000, because a larger vocabulary
                would only raise the bound
    llama-8b    8.1 billion weights: 36 layers of Llama 3 8B, the vocabulary as above. Only if asked for (--models
                llama-8b): its text alone takes more than an hour
    mixture     64 experts in each of 3 layers, 1.5 billion weights. They are stored one by one, 4 MB each, and
                transformers holds those of a layer in one tensor, in float32 256 times as large

Each row is a run of its own, all with --low-memory: what `compress` does by itself, with --refine none (plain
rounding), `detect` (the probe alone), and --preset best with two texts (--texts).

How the numbers are made:

    weights     made and written tensor by tensor, in shards of 1 GB; the same in every run
    process     each row is a fresh Python process that does nothing else
    peak        the most that was ever resident in it (VmHWM), everything included: interpreter, libraries, every
                page of a mapped file. Not: files in the kernel's page cache, which belong to no process
    private     the most of it that no file backs (RssAnon, looked at 200 times a second): what the kernel cannot take
                back, and what a machine runs out of
    imports     peak after importing torch, transformers and swquant, before the checkpoint is opened. It is part of
                what the bound allows
    tensor      the largest tensor as stored
    layer       the tensors of the largest decoder layer, as stored
    texts       float32 keys and values of all layers (while text is written; afterwards hidden states, which are less)

The bound is held against the peak for the llama, so against every page. For the mixture it is held against private:
the experts of the layer that runs are mapped from a file in the temporary folder, here beside the model (four bytes per
weight), and as many of their pages are resident as the kernel likes, none if it needs the memory.

The exit status is 1 if the bound does not hold. Linux only: other systems do not tell these numbers.

    python benchmarks/memory.py
    python benchmarks/memory.py --models llama-8b --rows best
    python benchmarks/memory.py --scale 0.25 --folder DISK
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
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

import swquant
from exporters.safetensors_file import SafetensorsWriter
from swquant.detect.prompt import DEFAULT_PROMPT

VOCABULARY = 32_000
SHARD = 10**9
SEED = 0
GIB = 2**30

Shape = tuple[int, ...]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 1,
}
# Name -> (layers at --scale 1, its configuration). Heads have 128 channels.
MODELS: dict[str, tuple[int, PreTrainedConfig]] = {
    "llama": (
        28,
        LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=24,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
            **_COMMON,
        ),
    ),
    "llama-8b": (
        36,
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
            **_COMMON,
        ),
    ),
    "mixture": (
        3,
        Qwen3MoeConfig(
            hidden_size=2048,
            intermediate_size=2048,
            moe_intermediate_size=1024,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=64,
            num_experts_per_tok=8,
            architectures=["Qwen3MoeForCausalLM"],
            **_COMMON,
        ),
    ),
}
BY_DEFAULT = ("llama", "mixture")
PRIVATE = ("mixture",)  # held to the bound by what no file backs


def layers_of(name: str, scale: float) -> int:
    return max(1, round(MODELS[name][0] * scale))


def tensors(name: str, layers: int) -> dict[str, Shape]:
    """Name -> shape of everything that is stored, in a checkpoint's usual order."""
    config: Any = MODELS[name][1]
    hidden, kv = config.hidden_size, 128 * config.num_key_value_heads
    parts: dict[str, Shape] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if name == "mixture":
        parts |= {"self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate": (config.num_experts, hidden)}
        mlps = [(f"mlp.experts.{expert}", config.moe_intermediate_size) for expert in range(config.num_experts)]
    else:
        mlps = [("mlp", config.intermediate_size)]
    for mlp, inner in mlps:
        parts |= {f"{mlp}.gate_proj": (inner, hidden), f"{mlp}.up_proj": (inner, hidden)}
        parts |= {f"{mlp}.down_proj": (hidden, inner)}
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def size(shape: Shape) -> int:
    return torch.Size(shape).numel() * torch.bfloat16.itemsize


def shards(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    files: list[dict[str, Shape]] = [{}]
    for name, shape in shapes.items():
        if sum(map(size, files[-1].values())) + size(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    return files


def make_model(name: str, folder: Path, layers: int) -> None:
    """config.json, tokenizer, index and shards; one tensor in memory at a time."""
    MODELS[name][1].update({"num_hidden_layers": layers})
    MODELS[name][1].save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "</s>", *DEFAULT_PROMPT.replace(".", " .").split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)

    generator = torch.Generator().manual_seed(SEED)
    files, weight_map = shards(tensors(name, layers)), {}
    for number, shapes in enumerate(files, start=1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        print(f"making {name}, {shard}", file=sys.stderr)
        layout = [(key, torch.bfloat16, shape) for key, shape in shapes.items()]
        writer = SafetensorsWriter(folder / shard, layout, {"format": "pt"})
        for key, shape in shapes.items():
            if len(shape) == 1:
                writer.write(key, torch.ones(shape, dtype=torch.bfloat16))
            else:
                writer.write(key, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        writer.finish()
        weight_map |= dict.fromkeys(shapes, shard)
    total = sum(map(size, tensors(name, layers).values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def compress(model: Path, out: Path, **options: Any) -> None:
    swquant.compress(model, out, low_memory=True, **options)


def probe(model: Path, out: Path) -> None:
    swquant.detect(model, low_memory=True)


# Row -> what it runs.
WORK: dict[str, Callable[[Path, Path], object]] = {
    "compress": compress,
    "plain rounding": lambda model, out: compress(model, out, refine="none"),
    "detect": probe,
    "best": lambda model, out: compress(model, out, preset="best", texts=int(os.environ.get("TEXTS", TEXTS))),
}
TEXTS, LENGTH = 2, 256


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


def measure(row: str, model: Path, texts: int) -> dict[str, Any]:
    """The same in a process of its own."""
    print(f"measuring: {row}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        command = [sys.executable, __file__, "--measure", row, os.fspath(model), os.fspath(Path(folder) / "out")]
        environment = {**os.environ, "TMPDIR": os.fspath(model.parent), "TEXTS": str(texts)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{row}: failed with status {done.returncode}, see above")
    return dict(json.loads(done.stdout))


def check_space(folder: Path, model_bytes: int) -> None:
    needed, free = model_bytes * 7 // 2, shutil.disk_usage(folder).free  # the model, a compressed copy, its experts
    if free < needed:
        sys.exit(
            f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; use --folder, or a smaller --scale"
        )


def bounds(name: str, layers: int, texts: int) -> dict[str, int]:
    """Row -> bytes that it may take."""
    sizes = {tensor: size(shape) for tensor, shape in tensors(name, layers).items()}
    config: Any = MODELS[name][1]
    layer = sum(size for tensor, size in sizes.items() if tensor.startswith("model.layers.0."))
    of_texts = texts * LENGTH * 2 * layers * 128 * config.num_key_value_heads * torch.float32.itemsize
    by_tensor = GIB + 3 * max(sizes.values())
    return dict.fromkeys(WORK, by_tensor) | {"best": GIB + 3 * max(layer, *sizes.values()) + of_texts}


def report(name: str, model: Path, layers: int, rows_wanted: list[str], texts: int) -> bool:
    """Measure every row and print the table. Returns whether the bound holds."""
    sizes = {tensor: size(shape) for tensor, shape in tensors(name, layers).items()}
    total = sum(sizes.values())
    bound, held = bounds(name, layers, texts), "private" if name in PRIVATE else "peak"
    print(
        f"{name}, {total / torch.bfloat16.itemsize / 1e9:.2f} billion weights, bfloat16, {total / 1e9:.2f} GB, "
        f"{len(sizes)} tensors"
    )
    print(
        f"{held} is held to 1 GiB + 3 x the largest tensor ({max(sizes.values()) / 1e6:.0f} MB), of best + 3 x the "
        f"largest layer and the keys and values of {texts} texts\n",
        flush=True,
    )
    rows, holds = [], True
    for row in rows_wanted:
        result = measure(row, model, texts)
        within = result[held] <= bound[row]
        holds &= within
        megabytes = [result[key] / 1e6 for key in ("imports", "peak", "private")]
        rows.append((row, *megabytes, bound[row] / 1e6, "yes" if within else "NO", result["seconds"]))
    print(f"| {'work':14} | imports, MB | peak, MB | private, MB | bound, MB | within | seconds |")
    print(f"|{'-' * 16}|------------:|---------:|------------:|----------:|:------:|--------:|")
    for row, imports, most, private, allowed, verdict, seconds in rows:
        numbers = f"{imports:11.0f} | {most:8.0f} | {private:11.0f} | {allowed:9.0f}"
        print(f"| {row:14} | {numbers} | {verdict:^6} | {seconds:7.0f} |")
    print(flush=True)
    return holds


def measured(name: str, options: argparse.Namespace) -> bool:
    """Make a model, measure it, and take it away."""
    layers = layers_of(name, options.scale)
    check_space(options.folder, sum(map(size, tensors(name, layers).values())))
    folder = Path(tempfile.mkdtemp(prefix="swquant-memory-", dir=options.folder))
    try:
        model = folder / name
        model.mkdir()
        make_model(name, model, layers)
        return report(name, model, layers, options.rows, options.texts)
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory that compressing large models takes.")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are made, on a disk"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(BY_DEFAULT), help="which of them")
    parser.add_argument("--rows", nargs="+", choices=WORK, default=list(WORK), help="what to measure")
    parser.add_argument("--texts", type=int, default=TEXTS, help="that the model writes itself, for best")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the layers to make; tensors keep their size")
    parser.add_argument("--keep", action="store_true", help="do not remove the models afterwards")
    parser.add_argument("--measure", nargs=3, metavar=("ROW", "MODEL", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        row, model, out = options.measure
        measure_here(row, Path(model), Path(out))
        return
    if not Path("/proc/self/status").exists():
        sys.exit("needs /proc/self/status, which only Linux has")
    if not 0 < options.scale <= 1:
        parser.error("--scale must be between 0 and 1")
    held = [measured(name, options) for name in options.models]  # all of them, whatever the first one gives
    if not all(held):
        sys.exit("the bound does not hold")


if __name__ == "__main__":
    main()
