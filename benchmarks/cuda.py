"""Our operator against ONNX Runtime's MatMulNBits on a CUDA device: the same bits, block and rows, in one run.

    python benchmarks/cuda.py [--size 4096] [--layers 8] [--calls 30]

A session holds a chain of layers [size, size] in float16, each with weights of its own, so that a call reads many times
what the device's cache holds. Inputs and outputs stay on the device, and calls replay a CUDA graph: what is timed is
the device's work. The sessions of a row take turns, call by call. Reported, per layer: the medians in microseconds,
ours beside MatMulNBits' as the median over neighbouring calls, and the bandwidth at which weights and scales arrived as
a share of what a copy reaches on this device (bytes read and written).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from exporters.ops import library_path

WARMUP = 5
COPY = 1 << 30  # bytes


@dataclass(frozen=True)
class Setting:
    bits: int
    block: int
    rows: int

    @property
    def stock_bits(self) -> int:
        """MatMulNBits lacks the odd ones."""
        return self.bits if self.bits in (4, 8) else 4


SETTINGS = (
    *(Setting(4, 32, rows) for rows in (1, 2, 4, 8, 16, 32, 64, 512)),
    *(Setting(4, 128, rows) for rows in (1, 8, 64)),
    *(Setting(bits, 32, rows) for bits in (2, 3, 6, 8) for rows in (1, 8)),
)


def model(kind: str, setting: Setting, size: int, layers: int) -> bytes:
    """A chain of `layers` linear layers; kind: ours, outliers (ours, one weight in 2,000 restored), stock, float16."""
    rng = np.random.default_rng(0)
    bits = setting.stock_bits if kind == "stock" else setting.bits
    blocks = size // setting.block
    nodes, weights = [], []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    for layer in range(layers):
        inputs = [f"x{layer}"]
        if kind == "float16":
            inputs.append(
                constant(
                    f"w{layer}",
                    (rng.random((size, size), np.float32) - 0.5).astype(np.float16) * np.float16((12 / size) ** 0.5),
                )
            )
            nodes.append(helper.make_node("MatMul", inputs, [f"x{layer + 1}"]))
            continue
        codes = np.frombuffer(rng.bytes(size * size * bits // 8), np.uint8).reshape(size, -1)
        spread = (4**bits / 12) ** 0.5 * size**0.5  # keeps activations near 1
        scales = (rng.uniform(0.9, 1.1, (size, blocks)) * rng.choice((-1, 1), (size, blocks)) / spread).astype(
            np.float16
        )
        attributes: dict[str, Any] = {"K": size, "N": size, "bits": bits}
        if kind == "stock":
            attributes |= {"domain": "com.microsoft", "block_size": setting.block}
            codes = codes.reshape(size, blocks, -1)
        else:
            attributes |= {"domain": "swquant", "block_cols": setting.block}
        inputs += [constant(f"codes{layer}", codes), constant(f"scales{layer}", scales)]
        if kind == "outliers":
            at = np.sort(rng.choice(size * size, size * size // 2000, replace=False))
            inputs += ["", *(constant(f"{name}{layer}", part.astype(np.int32)) for name, part in
                             (("rows", at // size), ("cols", at % size)))]  # fmt: skip
            inputs.append(constant(f"deltas{layer}", rng.normal(size=len(at)).astype(np.float32) / size))
        nodes.append(
            helper.make_node(
                "MatMulNBits" if kind == "stock" else "LinearNBits", inputs, [f"x{layer + 1}"], **attributes
            )
        )
    shape = [setting.rows, size]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT16, shape)],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("swquant", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class Bound:
    """A session on the device, which its one input and its output of the same shape never leave."""

    def __init__(self, model: bytes, x: np.ndarray, *, graphs: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graphs))})
        self.session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("no CUDA device, or an onnxruntime without CUDA (pip install onnxruntime-gpu)")
        self.binding = self.session.io_binding()
        self.held = [onnxruntime.OrtValue.ortvalue_from_numpy(x, "cuda", 0) for _ in range(2)]
        self.binding.bind_ortvalue_input(self.session.get_inputs()[0].name, self.held[0])
        self.binding.bind_ortvalue_output(self.session.get_outputs()[0].name, self.held[1])

    def call(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)  # returns when the device is done
        return time.perf_counter() - start


def compare(setting: Setting, kinds: Sequence[str], size: int, layers: int, calls: int, graphs: bool) -> dict[str, Any]:
    """Seconds per layer of single calls, by kind; the sessions take turns."""
    x = np.random.default_rng(1).normal(size=(setting.rows, size)).astype(np.float16)
    chains = {kind: Bound(model(kind, setting, size, layers), x, graphs=graphs) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(calls + WARMUP):
        for kind, chain in chains.items():
            spent = chain.call() / layers
            if turn >= WARMUP:
                seconds[kind].append(spent)
    return {**asdict(setting), "seconds": seconds}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy on the device: a session that multiplies a large tensor."""
    count = COPY // 4
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    graph = helper.make_graph(
        [node],
        "copy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [count])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [count])],
        [numpy_helper.from_array(np.array([1.5], np.float32), "factor")],
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    bound = Bound(whole, np.ones(count, np.float32))
    times = [bound.call() for _ in range(20)]
    return 2 * COPY / statistics.median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a layer's weight")
    parser.add_argument("--layers", type=int, default=8, help="in the chain")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument(
        "--no-graphs", action="store_true", help="launch by launch, as a model runs without CUDA graphs"
    )
    parser.add_argument("--rows", type=int, nargs="*", help="only these")
    parser.add_argument("--json", type=Path, help="write every timing here")
    arguments = parser.parse_args()
    if library_path() is None:
        raise SystemExit("no operator library: python -m exporters.ops.build")
    peak = copy_bandwidth()
    print(f"onnxruntime {onnxruntime.__version__}, a copy moves {peak / 1e12:.2f} TB/s, {arguments.layers} layers of "
          f"[{arguments.size}, {arguments.size}], float16")  # fmt: skip
    print(
        "\n| bits | block | rows | MatMul float16 | MatMulNBits | ours | ratio | with outliers | ratio | share of bandwidth |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    kept = []
    for setting in SETTINGS:
        if arguments.rows and setting.rows not in arguments.rows:
            continue
        kinds = ("float16", "stock", "ours", "outliers")
        found = compare(setting, kinds, arguments.size, arguments.layers, arguments.calls, not arguments.no_graphs)
        kept.append(found)
        seconds = found["seconds"]
        micro = {kind: f"{statistics.median(times) * 1e6:.1f}" for kind, times in seconds.items()}
        ratio = {
            kind: statistics.median(stock / ours for stock, ours in zip(seconds["stock"], seconds[kind], strict=True))
            for kind in ("ours", "outliers")
        }
        moved = arguments.size**2 * (setting.bits / 8 + 2 / setting.block)
        share = moved / statistics.median(seconds["ours"]) / peak
        against = "" if setting.bits == setting.stock_bits else " (stock 4)"
        cells = [f"{setting.bits}{against}", setting.block, setting.rows, micro["float16"], micro["stock"], micro["ours"],
                 f"{ratio['ours']:.2f}", micro["outliers"], f"{ratio['outliers']:.2f}", f"{share:.0%}"]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
