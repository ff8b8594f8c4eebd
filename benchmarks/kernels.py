"""Our operator against ONNX Runtime's MatMulNBits: the same bits, block, accuracy level, rows and threads, in one run.

    python benchmarks/kernels.py [--size 4096] [--threads 1] [--rounds 5] [--cpu-time] [--quick]

Every measurement is a process of its own (two sessions in one process share their cores and spoil each other's
timings); the two operators take turns, round by round. A process warms up, then times single calls for a second or so.
Reported: the median over all calls of all rounds, the shortest call, and stock / ours of both. Where MatMulNBits lacks
the bits, ours is compared with its 4-bit kernel, which says what odd bits cost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SECONDS = 0.7


@dataclass(frozen=True)
class Setting:
    bits: int
    block: int
    level: int
    rows: int


def settings(quick: bool) -> list[Setting]:
    if quick:
        return [Setting(4, 32, 4, 1), Setting(4, 32, 4, 64)]
    table = [Setting(4, block, 4, rows) for block in (32, 128) for rows in (1, 8, 64, 256)]
    table += [Setting(4, 32, 0, rows) for rows in (1, 64)]
    table += [Setting(bits, 32, 4, rows) for bits in (2, 8, 3, 6) for rows in (1, 64)]
    return table


def model(kind: str, setting: Setting, size: int) -> bytes:
    """One node of random weights [size, size]."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    bits = setting.bits if kind == "ours" or setting.bits in (2, 4, 8) else 4
    blocks = size // setting.block
    codes = rng.integers(0, 256, (size, size * bits // 8), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.002, (size, blocks)).astype(np.float32)
    attributes = {"K": size, "N": size, "bits": bits, "accuracy_level": setting.level}
    if kind == "ours":
        node = helper.make_node(
            "LinearNBits", ["A", "B", "scales"], ["Y"], domain="swquant", block_cols=setting.block, **attributes
        )
    else:
        codes = codes.reshape(size, blocks, setting.block * bits // 8)
        node = helper.make_node(
            "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", block_size=setting.block, **attributes
        )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", size])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", size])],
        [numpy_helper.from_array(codes, "B"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("swquant", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def measure(kind: str, setting: Setting, size: int, threads: int, cpu_time: bool) -> list[float]:
    """Seconds of single calls, in this process."""
    import onnxruntime

    from exporters.ops import library_path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if kind == "ours":
        path = library_path()
        if path is None:
            raise SystemExit("no operator library: python -m exporters.ops.build")
        options.register_custom_ops_library(str(path))
    session = onnxruntime.InferenceSession(model(kind, setting, size), options, providers=["CPUExecutionProvider"])
    a = np.random.default_rng(1).normal(size=(setting.rows, size)).astype(np.float32)
    for _ in range(3):
        session.run(None, {"A": a})
    times: list[float] = []
    clock = time.process_time if cpu_time else time.perf_counter
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = clock()
        session.run(None, {"A": a})
        times.append(clock() - start)
    return times


def compare(setting: Setting, size: int, threads: int, rounds: int, cpu_time: bool) -> dict[str, list[float]]:
    """Seconds of all calls of both operators, each round two processes."""
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for turn in range(rounds):
        for kind in ("stock", "ours") if turn % 2 else ("ours", "stock"):
            one = json.dumps([kind, asdict(setting), size, threads, cpu_time])
            done = subprocess.run([sys.executable, __file__, "--one", one], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            times[kind] += json.loads(done.stdout)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two settings, one round: too short to quote")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that is not idle")
    parser.add_argument("--json", type=Path, help="write every timing here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, setting, *rest = json.loads(arguments.one)
        print(json.dumps(measure(kind, Setting(**setting), *rest)))
        return
    if arguments.cpu_time and arguments.threads > 1:
        parser.error("--cpu-time adds up the time of all threads; it needs --threads 1")
    import onnxruntime

    print(
        f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, {os.cpu_count()} cores, {arguments.threads} "
        f"thread(s), load {os.getloadavg()[0]:.1f}, SWQUANT_CPU={os.environ.get('SWQUANT_CPU', 'unset')}, "
        f"weights [{arguments.size}, {arguments.size}], milliseconds{' of processor time' if arguments.cpu_time else ''}"
    )
    print("\n| bits | block | level | rows | MatMulNBits | ours | ratio | best: MatMulNBits | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    kept = []
    for setting in settings(arguments.quick):
        rounds = 1 if arguments.quick else arguments.rounds
        times = compare(setting, arguments.size, arguments.threads, rounds, arguments.cpu_time)
        kept.append({**asdict(setting), **times})
        cells = []
        for of in (statistics.median, min):
            stock, ours = of(times["stock"]) * 1e3, of(times["ours"]) * 1e3
            cells += [f"{stock:.2f}", f"{ours:.2f}", f"{stock / ours:.2f}"]
        against = "" if setting.bits in (2, 4, 8) else " (stock 4)"
        print(
            f"| {setting.bits}{against} | {setting.block} | {setting.level} | {setting.rows} | {' | '.join(cells)} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
