"""How fast is plain 4-bit rounding, tool by tool, on the same tensors in the same run?

A *weight pass* takes a [out, in] tensor to what a tool would write to disk: choose a scale for every 128
inputs, round, pack. Nothing but the weights is read. Each tool is called as its own pipeline calls it,
with its fastest settings and all cores:

    swquant              round, then pack to the compressed-tensors layout; `refined` also searches each block's
                         scale with the importance of its inputs, as `compress` does by default
    compressed-tensors   its own min/max, quantize and packer: the same layout
    AutoRound            the function of its model-free mode (round and pack to auto_gptq), eager and
                         under torch.compile, which is that mode's default outside Windows
    ONNX Runtime         the C++ kernel under MatMulNBitsQuantizer
    ggml                 Q4_0, llama.cpp's simplest type (symmetric, block 32), and Q4_K, which searches its scales;
                         rows shared among the threads
    HQQ                  min/max rounding with a float zero point (`optimize=False`, its fastest); also with
                         its default optimizer, which does more than round and is what its users get

How the numbers are made:

    interleaved   every round runs every tool once, in a new order: the machine's load, and what one tool
                  leaves behind for the next in caches and allocator, meet all alike
    median        of --rounds timings per tensor, after one warm-up (which also pays for compilation); a
                  tool that has used 20 seconds on a tensor sits out the remaining rounds
    best          the same with each tensor's shortest time: what is left when nothing interferes
    in the timer  casts that a tool's pipeline makes, and its packing. Not: a transpose that it wants to find
                  done; reading, hashing, writing, and the rounding error that `compress` also measures
    threads       as many as the machine has cores, for all: torch's setting, and ONNX Runtime's own pool
    ratio         peer time / swquant time (medians), symmetric against symmetric, asymmetric against
                  asymmetric, tools that search against `refined`: above 1, swquant is faster
    checked       the warm-up's result is decoded and compared with the weight, block by block; a tool
                  that fails, or is not installed, says so in its row
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrationless import Group, dequantize, quantize, quantize_affine
from exporters import compact_layout
from exporters.compressed_tensors import from_tensors, to_tensors

GROUP, BITS, SEED = 128, 4, 20240
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # attention, up and down projection of a 7B model
DTYPES = [torch.float32, torch.bfloat16]
REFINED, OFFSETS = "swquant refined", "swquant refined, offsets"
PATIENCE = 20.0  # seconds; HQQ's optimizer would otherwise take nine tenths of the whole run
MISSING = "not installed: pip install 'swquant[bench]'"


@dataclass(frozen=True)
class Case:
    """One row: a tool and one way to call it. against: the row of ours that does the same kind of work.

    run: what is timed. decode: its result -> float [out, in] (or a shape that flattens to it), for the
    check. prepare: weight -> what `run` takes, outside the timer.
    """

    tool: str
    package: str
    call: str
    against: str
    run: Callable[[Any], Any]
    decode: Callable[[Any], Tensor]
    prepare: Callable[[Tensor], Any] = lambda weight: weight


def swquant_cases() -> list[Case]:
    def case(symmetric: bool) -> Case:
        return Case(
            tool="swquant" if symmetric else "swquant asymmetric",
            package="swquant",
            call=f"to_tensors(quantize(w, Group(128), 4, symmetric={symmetric}))",
            against="swquant" if symmetric else "swquant asymmetric",
            run=lambda weight: to_tensors(quantize(weight, Group(GROUP), BITS, symmetric=symmetric)),
            decode=lambda result: dequantize(from_tensors(result, BITS)),
        )

    refined = Case(
        tool=REFINED,
        package="swquant",
        call="to_tensors(quantize(w, Group(128), 4, importance=mean squares of the inputs))",
        against=REFINED,
        run=lambda weight: to_tensors(quantize(weight, Group(GROUP), BITS, importance=importance(weight.shape[1]))),
        decode=lambda result: dequantize(from_tensors(result, BITS)),
    )
    offsets = Case(
        tool=OFFSETS,
        package="swquant",
        call="compact_layout.to_tensors(quantize_affine(w, Group(128), 4, importance=…, storage=None))",
        against=OFFSETS,
        run=lambda weight: compact_layout.to_tensors(
            quantize_affine(weight, Group(GROUP), BITS, importance=importance(weight.shape[1]), storage=None)
        ),
        decode=lambda result: dequantize(
            compact_layout.from_tensors(result, BITS, (len(result["codes"]), result["codes"].shape[1] * 32 // BITS))
        ),
    )
    return [case(True), case(False), refined, offsets]


def importance(inputs: int) -> Tensor:
    """Mean squares of input channels as they are found in models: most alike, some a hundred times larger."""
    return torch.randn(inputs, generator=torch.Generator().manual_seed(SEED)).exp().square()


def compressed_tensors_cases() -> list[Case]:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def run(weight: Tensor) -> dict[str, Tensor]:
        scale, zero_point = compute_dynamic_scales_and_zp(weight, args, module=None)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        return PackedQuantizationCompressor.compress(state, scheme)

    def decode(result: dict[str, Tensor]) -> Tensor:
        return PackedQuantizationCompressor.decompress(result, scheme)["weight"]

    call = "compute_dynamic_scales_and_zp, then PackedQuantizationCompressor.compress (quantize, pack_to_int32)"
    return [Case("compressed-tensors", "compressed-tensors", call, "swquant", run, decode)]


def auto_round_cases() -> list[Case]:
    from auto_round.utils.device import compile_func
    from auto_round.utils.model_free_utils import quantize_weight_rtn

    options = {"bits": BITS, "group_size": GROUP, "sym": True, "device": "cpu", "disable_opt_rtn": True}
    options["packing"] = "auto_round:auto_gptq"

    def decode(result: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        words, _, scales = result  # int32 [in / 8, out], lowest bits first; float16 [in / group, out]
        codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, BITS)], dim=1).flatten(0, 1)
        return ((codes - 8) * scales.float().repeat_interleave(GROUP, dim=0)).T

    def case(tool: str, call: str, function: Callable[..., Any]) -> Case:
        return Case(tool, "auto-round", call, "swquant", lambda weight: function(weight=weight, **options), decode)

    call = "quantize_weight_rtn(w, 4, 128, sym=True, disable_opt_rtn=True, packing='auto_round:auto_gptq')"
    return [
        case("AutoRound compiled", "torch.compile of the next row", compile_func(quantize_weight_rtn, "cpu")),
        case("AutoRound eager", call, quantize_weight_rtn),
    ]


def onnxruntime_cases() -> list[Case]:
    import numpy as np
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    def run(transposed: Tensor) -> tuple[Any, Any]:
        weight = transposed.to(torch.float32).numpy()  # its pipeline casts bf16 too, with numpy
        in_features, out_features = weight.shape
        blocks = in_features // GROUP
        packed = np.zeros((out_features, blocks, GROUP // 2), dtype="uint8")
        scales = np.zeros((out_features, blocks), dtype=weight.dtype)
        zero_points = np.zeros((out_features, (blocks + 1) // 2), dtype="uint8")
        quantize_matmul_4bits(packed, weight, scales, zero_points, GROUP, out_features, in_features, True)
        return packed, scales

    def decode(result: tuple[Any, Any]) -> Tensor:
        packed, scales = (torch.from_numpy(array) for array in result)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2).float()
        return (codes - 8) * scales.unsqueeze(-1)

    call = "quantize_matmul_4bits(w.T, block 128, symmetric); bf16 cast to float32 first, as in its pipeline"
    # MatMul stores [in, out]: handing it w.T as its own layout is not part of rounding.
    return [Case("ONNX Runtime", "onnxruntime", call, "swquant", run, decode, lambda weight: weight.T.contiguous())]


def hqq_cases() -> list[Case]:
    from hqq.core.quantize import Quantizer

    def case(optimize: bool) -> Case:
        options = {"nbits": BITS, "group_size": GROUP, "axis": 1, "channel_wise": True, "optimize": optimize}
        return Case(
            tool="HQQ optimized" if optimize else "HQQ plain",
            package="hqq",
            call=f"Quantizer.quantize(w, nbits=4, group_size=128, axis=1, optimize={optimize}, device='cpu')",
            against=REFINED if optimize else "swquant asymmetric",
            run=lambda weight: Quantizer.quantize(weight, compute_dtype=weight.dtype, device="cpu", **options),
            decode=lambda result: Quantizer.dequantize(*result),
        )

    return [case(False), case(True)]


def ggml_cases() -> list[Case]:
    from peers import ggml

    ggml.library()  # raises ImportError here, not in the timer

    def case(name: str, against: str) -> Case:
        return Case(
            tool=f"ggml {name}",
            package="libggml-python",
            call=f"ggml_quantize_chunk({name}); bf16 cast to float32 first, which is all that it takes",
            against=against,
            run=lambda weight: (ggml.quantize(weight.float(), name, threads=torch.get_num_threads()), weight.shape),
            decode=lambda result: ggml.dequantize(result[0], name, result[1]),
        )

    return [case("Q4_0", "swquant"), case("Q4_K", REFINED)]


# Tool, the module whose absence means "not installed", and the function that knows how to call it.
PEERS = [
    ("compressed-tensors", "compressed_tensors", compressed_tensors_cases),
    ("AutoRound", "auto_round", auto_round_cases),
    ("ONNX Runtime", "onnxruntime", onnxruntime_cases),
    ("ggml", "libggml", ggml_cases),
    ("HQQ", "hqq", hqq_cases),
]


def load_cases() -> tuple[list[Case], dict[str, str]]:
    """Every case that can run, and tool -> reason for the peers that cannot."""
    cases, absent = swquant_cases(), {}
    for tool, module, build in PEERS:
        try:
            cases += build()
        except ImportError as error:
            absent[tool] = MISSING if error.name == module else f"cannot be imported: {error}"
    return cases, absent


def attempt(case: Case, weight: Tensor) -> str | None:
    """Warm up and check one case: None, or the reason why its times would mean nothing.

    A block's step is at most 2 / 15 of its largest magnitude. Rounding errs by half of that; an extreme
    that a range of -8 .. 7 cannot reach errs by a whole one, one that a search gives up by some more.
    """
    try:
        decoded = case.decode(case.run(case.prepare(weight))).float().reshape(-1, GROUP)
    except Exception as error:  # a peer may fail in any way; its row says how
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    original = weight.float().reshape(-1, GROUP)
    steps = original.abs().amax(dim=1, keepdim=True) * 2 / 15
    worst = float(((decoded - original).abs() / steps).max())
    limit = 4.0 if case.against in (REFINED, OFFSETS) else 1.1
    return None if worst <= limit else f"wrong result: {worst:.2f} steps away from the weight"


def measure(
    cases: list[Case], shapes: list[tuple[int, int]], dtype: torch.dtype, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Seconds by tool and shape, one per round; and tool -> reason for those that cannot be timed."""
    seconds: dict[str, dict[str, list[float]]] = {case.tool: {} for case in cases}
    problems: dict[str, str] = {}
    order = random.Random(SEED)
    for rows, cols in shapes:
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(SEED)).mul_(0.02).to(dtype)
        for case in cases:
            if case.tool not in problems and (problem := attempt(case, weight)):
                problems[case.tool] = problem
        running = [(case, case.prepare(weight)) for case in cases if case.tool not in problems]
        for number in range(rounds):
            print(f"{dtype} {rows}x{cols}: round {number + 1} of {rounds}", file=sys.stderr)
            for case, prepared in order.sample(running, len(running)):
                timings = seconds[case.tool].setdefault(f"{rows}x{cols}", [])
                if sum(timings) > PATIENCE:
                    continue
                start = time.perf_counter()
                result = case.run(prepared)
                timings.append(time.perf_counter() - start)
                del result  # freed outside the timer
    return seconds, problems


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source tree"


def report(
    cases: list[Case], shapes: list[tuple[int, int]], dtype: torch.dtype, rounds: int, absent: dict[str, str]
) -> list[dict[str, Any]]:
    """Measure one dtype, print its table, and return it as JSON objects."""
    seconds, problems = measure(cases, shapes, dtype, rounds)
    million = sum(rows * cols for rows, cols in shapes) / 1e6

    def rate(tool: str, choose: Callable[[list[float]], float]) -> float:
        """Million weights per second over all tensors; NaN for a tool that was not timed."""
        total = sum(map(choose, seconds[tool].values()))
        return million / total if total else float("nan")

    name = str(dtype).removeprefix("torch.")
    print(f"\n| {name:18} | {'version':11} | M weights/s | best | ratio |")
    print(f"|{'-' * 20}|{'-' * 13}|------------:|-----:|------:|")
    entries: list[dict[str, Any]] = []
    for case in cases:
        entry = {"tool": case.tool, "version": version(case.package), "called": case.call}
        if case.tool in problems:
            entry |= {"problem": problems[case.tool]}
        else:
            median, best = rate(case.tool, statistics.median), rate(case.tool, min)
            ratio = rate(case.against, statistics.median) / median
            entry |= {"million_weights_per_second": median, "best": best, "ratio": ratio, "seconds": seconds[case.tool]}
            print(f"| {case.tool:18} | {entry['version']:11} | {median:11.1f} | {best:4.0f} | {ratio:5.2f} |")
        entries.append(entry)
    for tool, problem in (problems | absent).items():
        print(f"| {tool:18} | {problem}")
    return entries + [{"tool": tool, "problem": problem} for tool, problem in absent.items()]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # read before we add to it
    threads, release = torch.get_num_threads(), torch.__version__
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "threads": threads, "torch": release}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time plain 4-bit rounding and packing, tool by tool.")
    parser.add_argument("--quick", action="store_true", help="one 2048x2048 tensor instead of three large ones")
    parser.add_argument("--rounds", type=int, default=5, help="timings per tool and tensor (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every timing to FILE")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")

    cases, absent = load_cases()
    torch.set_num_threads(os.cpu_count() or 1)  # after the imports: a peer may have changed it
    shapes = [(2048, 2048)] if options.quick else SHAPES
    facts = machine()
    print("{cpu}, {cores} cores (load {load}), {threads} threads, torch {torch}".format(**facts))
    print(f"{', '.join(f'{rows}x{cols}' for rows, cols in shapes)}; median of {options.rounds} interleaved rounds")
    with torch.no_grad():
        results = {str(dtype): report(cases, shapes, dtype, options.rounds, absent) for dtype in DTYPES}
    print("\nWhat was called:\n")
    for case in cases:
        print(f"- {case.tool}: `{case.call}`")
    if options.json:
        content = {"machine": facts, "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
