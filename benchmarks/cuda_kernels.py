"""The CUDA kernels of the ONNX operator alone, with no runtime around them: microseconds per layer, and torch's.

    python benchmarks/cuda_kernels.py [--size 4096] [--layers 8] [--against ANOTHER/standalone.cc]

nvcc compiles `exporters/ops/cuda/standalone.cc` for the device at hand. A chain of layers [size, size] in float16, each
with weights of its own, is captured into a CUDA graph and replayed; a number is the median over replays, per layer.
Ours: the product of few rows, the same with one weight in 2,000 restored, and, for prompts, `dequantize` with torch's
matmul behind it. Beside them: torch's matmul of float16 weights, and its own 4-bit kernel (tinygemm, bfloat16).
--against: the kernels of another checkout in the same run; what is compiled already (.so) is taken as it is. `cuda.py`
compares whole ONNX Runtime sessions.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.ops.build import FOLDER, find_nvcc

SOURCE = FOLDER / "cuda" / "standalone.cc"
REPLAYS, LOOPS = 40, 5  # graphs replayed, and how often each goes through the chain
SETTINGS = (
    *((4, 32, rows) for rows in (1, 2, 4, 8, 16)),
    *((4, 128, rows) for rows in (1, 8)),
    *((bits, 32, rows) for bits in (2, 8) for rows in (1, 8)),
)
PROMPTS = ((4, 32, 64), (4, 32, 512), (4, 128, 64))
Launch = Callable[[Tensor], None]


def compiled(source: Path, folder: Path) -> ctypes.CDLL:
    if source.suffix == ".so":
        return ctypes.CDLL(str(source.resolve()))
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc; install CUDA's, or pip install nvidia-cuda-nvcc")
    major, minor = torch.cuda.get_device_capability()
    target = folder / f"kernels-{abs(hash(source))}.so"
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{major}{minor}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.run([nvcc, "-x", "cu", *flags, "-cudart", "static", "-shared", source, "-o", target], check=True)
    return ctypes.CDLL(str(target))


class Layer:
    """Codes of [size, size], random, in the kernels' layout, where any bits are codes."""

    def __init__(self, library: ctypes.CDLL, size: int, bits: int, block: int, outliers: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        chunks = size * bits // 512 * 4
        codes = torch.randint(-(1 << 31), 1 << 31, (size, chunks * 4), generator=generator, dtype=torch.int64)
        scale = (1 + 0.1 * torch.rand(size, size // block, generator=generator)) / (2**bits * size**0.5) * 3
        rows = torch.randint(size, (outliers,), generator=generator).sort().values
        first = torch.searchsorted(rows, torch.arange(size + 1))
        cols = torch.randint(size, (outliers,), generator=generator)
        arrays = [
            codes.to(torch.int32),
            scale.half(),
            None,
            first.int(),
            cols.int(),
            torch.randn(outliers, generator=generator) / size,
            None,
        ]
        self.held = [None if array is None else array.cuda() for array in arrays]
        self.data = (ctypes.c_void_p * 7)(*(None if item is None else item.data_ptr() for item in self.held))
        self.sizes = (ctypes.c_int32 * 6)(size, size, chunks, size // block, 1, block)
        self.library, self.bits, self.size = library, bits, size

    def _run(self, a: Tensor | None, y: Tensor | None, restored: Tensor | None) -> None:
        error = self.library.swquant_cuda_launch(
            b"float16", self.bits, self.data, self.sizes, ctypes.c_float(2.0 ** (self.bits - 1)),
            ctypes.c_void_p(None if a is None else a.data_ptr()), ctypes.c_int64(0 if a is None else len(a)),
            ctypes.c_void_p(None if y is None else y.data_ptr()),
            ctypes.c_void_p(None if restored is None else restored.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        if error:
            raise SystemExit(f"CUDA error {error}")

    def product(self, a: Tensor) -> Tensor:
        y = torch.empty(len(a), self.size, device="cuda", dtype=torch.float16)
        self._run(a, y, None)
        return y

    def dequantized(self) -> Tensor:
        restored = torch.empty(self.size, self.size, device="cuda", dtype=torch.float16)
        self._run(None, None, restored)
        return restored


def check(layer: Layer) -> None:
    """Both kernels must agree: a product is the product with the dequantized weight."""
    a = torch.randn(3, layer.size, device="cuda").half()
    expected = a.float() @ layer.dequantized().float().T
    difference = float((layer.product(a).float() - expected).abs().max() / expected.abs().max())
    if not difference < 5e-3:
        raise SystemExit(f"{layer.bits} bits: the product is off by {difference:.2g}")


def microseconds(work: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Per layer: the median over replays of a graph that goes through all layers `LOOPS` times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in work:
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(LOOPS):
                for layer in work:
                    layer(x)
        times = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / LOOPS / len(work))
    return statistics.median(times[5:])


def tinygemm(size: int, block: int, layers: int) -> list[Callable[[Tensor], Tensor]] | None:
    """torch's own kernel of 4 bits, where there is one."""

    def layer() -> Callable[[Tensor], Tensor]:
        codes = torch.randint(256, (size, size // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(size // block, size, 2, device="cuda", dtype=torch.bfloat16) / size
        return lambda x: torch.ops.aten._weight_int4pack_mm(x.bfloat16() if x.dtype != torch.bfloat16 else x, packed, block, scales)  # fmt: skip

    try:
        made = [layer() for _ in range(layers)]
        made[0](torch.zeros(1, size, device="cuda", dtype=torch.bfloat16))
        return made
    except RuntimeError:
        return None


def row(libraries: dict[str, ctypes.CDLL], setting: tuple[int, int, int], size: int, layers: int) -> dict[str, float]:
    bits, block, rows = setting
    x = torch.randn(rows, size, device="cuda").half()
    dense = [torch.randn(size, size, device="cuda").half() for _ in range(layers)]
    found = {"matmul float16": microseconds([lambda x, w=w: x @ w.T for w in dense], x)}
    if bits == 4 and (peers := tinygemm(size, block, layers)):
        found["torch int4"] = microseconds(peers, x.bfloat16())
    for name, library in libraries.items():
        for kind, outliers in (("", 0), (" + outliers", size * size // 2000)):
            chain = [Layer(library, size, bits, block, outliers, seed) for seed in range(layers)]
            check(chain[0])
            if rows <= 16:
                found[f"{name}{kind}"] = microseconds([layer.product for layer in chain], x)
            else:
                found[f"{name} dequantize{kind}"] = microseconds([lambda _, of=of: of.dequantized() for of in chain], x)
                found[f"{name}{kind}"] = microseconds([lambda x, of=of: x @ of.dequantized().T for of in chain], x)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a layer's weight")
    parser.add_argument("--layers", type=int, default=8, help="in the chain")
    parser.add_argument("--kernels", type=Path, default=SOURCE)
    parser.add_argument("--against", type=Path, help="standalone.cc of another checkout")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    kept = []
    with tempfile.TemporaryDirectory() as name:
        libraries = {"ours": compiled(options.kernels, Path(name))}
        if options.against is not None:
            libraries["before"] = compiled(options.against, Path(name))
        print(
            f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {options.layers} layers of {options.size}²"
        )
        for setting in (*SETTINGS, *PROMPTS):
            found = row(libraries, setting, options.size, options.layers)
            kept.append({"bits": setting[0], "block": setting[1], "rows": setting[2], **found})
            cells = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{setting[0]} bits, blocks of {setting[1]}, {setting[2]} rows: {cells}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
