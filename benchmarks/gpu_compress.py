"""How fast weights are rounded on a GPU: million weights per second for one layer of each size, beside other tools.

    python benchmarks/gpu_compress.py                       # every size and tool that is there
    python benchmarks/gpu_compress.py --sizes 4096 --json out.json

Layers are bfloat16, already on the device, in 4 bits and blocks of 128 (64 with offsets). `fast`, `balanced` and `best`
are what `compress` does to one weight with these presets: plain rounding, the search with the energy of the inputs and
outliers, and error feedback besides. Timed is the recipe alone, to the end of the last kernel; reading, packing and
writing are the same on every device. Peers get the same tensor. A tool that is not installed is listed as such.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch import Tensor

from calibrationless import Evidence, Group, Recipe, follow, inverse_factor

ROUNDS, ENOUGH = 5, 10.0  # timings, and seconds after which no more are taken
Work = Callable[[Tensor], object]


def ours(size: int, device: str) -> dict[str, Work]:
    """Preset -> what it does to a [size, size] weight on `device`."""
    generator = torch.Generator().manual_seed(1)
    energy = (torch.rand(size, generator=generator) ** 6).to(device)
    inputs = torch.randn(4096, size, generator=generator).to(device) * energy.sqrt()
    factor = inverse_factor(inputs.T @ inputs)
    plain, kept = Recipe(Group(128), 4), size * size // 2000
    searched = Recipe(Group(128), 4, outliers=kept)
    return {
        "swquant fast": lambda weight: follow(plain, weight),
        "swquant balanced": lambda weight: follow(searched, weight, Evidence(energy, energy)),
        "swquant balanced, offsets": lambda weight: follow(
            Recipe(Group(64), 4, offsets="float", outliers=kept), weight, Evidence(energy, energy)
        ),
        "swquant best": lambda weight: follow(searched, weight, Evidence(energy, energy, factor)),
    }


def hqq(device: str) -> Work:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    return lambda weight: quantizer.quantize(
        weight, nbits=4, group_size=128, axis=1, device=device, compute_dtype=torch.bfloat16
    )


def torchao(device: str) -> Work:
    api = importlib.import_module("torchao.quantization")
    # on CUDA the packing of torch's own kernel, which needs no other package
    how = {} if device == "cpu" else {"int4_packing_format": "tile_packed_to_4d"}

    def work(weight: Tensor) -> object:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        api.quantize_(layer, api.Int4WeightOnlyConfig(group_size=128, **how))
        return layer

    return work


def auto_round(_: str) -> Work:
    rounded = importlib.import_module("auto_round.data_type.int").quant_tensor_sym
    return lambda weight: rounded(weight, bits=4, group_size=128)


PEERS: dict[str, Callable[[str], Work]] = {"HQQ": hqq, "torchao int4": torchao, "AutoRound RTN": auto_round}


def seconds(work: Work, weight: Tensor) -> float:
    """Median of `ROUNDS`, after one that warms up."""
    times: list[float] = []
    while len(times) <= ROUNDS and (len(times) < 2 or sum(times) < ENOUGH):
        given = weight.clone()
        _wait(weight)
        start = time.perf_counter()
        work(given)
        _wait(weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(weight: Tensor) -> None:
    if weight.device.type == "cuda":
        torch.cuda.synchronize(weight.device)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu runs the same on the processor")
    rates: dict[str, dict[int, float | str]] = {}
    for size in options.sizes:
        torch.manual_seed(0)
        weight = (torch.randn(size, size, device=options.device) * 0.02).to(torch.bfloat16)
        works: dict[str, Callable[[], Work]] = {
            name: lambda work=work: work for name, work in ours(size, options.device).items()
        }
        works |= {name: lambda make=make: make(options.device) for name, make in PEERS.items()}
        for name, make in works.items():
            rates.setdefault(name, {})[size] = found = rate(make, weight)
            print(f"{size} {name}: {found}", file=sys.stderr, flush=True)
    show(rates, options.sizes, options.device)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "rates": rates}, indent=1) + "\n")


def rate(make: Callable[[], Work], weight: Tensor) -> float | str:
    """Million weights per second, or why there is no number."""
    try:
        return weight.numel() / seconds(make(), weight) / 1e6
    except ImportError:
        return "not installed"
    except Exception as error:  # a peer that does not take this shape, or this device
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"


def show(rates: dict[str, dict[int, Any]], sizes: Sequence[int], device: str) -> None:
    name = torch.cuda.get_device_name() if device != "cpu" else "the CPU"
    print(f"Million weights per second on {name}, PyTorch {torch.__version__}\n")
    print(f"| | {' | '.join(f'{size}²' for size in sizes)} |\n|---|{'---:|' * len(sizes)}")
    for tool, by_size in rates.items():
        cells = [f"{found:,.1f}" if isinstance(found := by_size[size], float) else found for size in sizes]
        print(f"| {tool} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
