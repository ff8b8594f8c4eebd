"""What INT8 activations cost: naive, SmoothQuant, and massive activations replaced and restored (the paper's Table 3).

Two small models, taken off the grid that their weights are stored on (`grid.py`), W8A8 and W4A8, one scale per tensor
and per token. In a cell of the table all methods round the same weights in the same way, and the inputs of the same
linears (all of the decoder layers); `activation_methods.py` says what each does. The original is the model in float32.

    texts        the beginning of WikiText-2's test set, and Python source, a text of another kind. No method sees them
    calibration  SmoothQuant reads the beginning of WikiText-2's validation set, 16 windows of 256 tokens
    KL           of the original's predictions from the method's, in nats, mean over all predicted tokens
    regained     (naive - method) / (naive - SmoothQuant), of KL, in the same cell
    as a user    torch's dynamic quantization and ONNX Runtime's, called as their documentation says, on the same model

With --json a run remembers what it has measured, and goes on from there.

    python benchmarks/activations.py --smollm2 MODEL.gguf --gemma MODEL.gguf --json activations.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from activation_methods import METHODS, Method, Rounder, round_weights, smoothing
from grid import break_and_check
from machine import describe
from torch import Tensor, nn

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.pipeline import find_super_weights
from swquant.evaluate.pipeline import Windows, fit_window, make_windows, perplexity_of, score_window, window_logits
from swquant.models.loading import build_model

DATA = Path(__file__).parent.parent / "data"
# Text -> (file, tokens per window, windows by model): a token of a large vocabulary takes longer.
TEXTS = {
    "wikitext2": (DATA / "wikitext2-excerpt.txt", {"smollm2": (1024, 1), "gemma": (256, 1)}),
    "python": (DATA / "python-source.txt", {"smollm2": (512, 1), "gemma": (256, 1)}),
}
CALIBRATION = (DATA / "wikitext2-valid-excerpt.txt", 256, 16)
BITS = (8, 4)
SCALES = ("per-tensor", "per-token")
Record = dict[str, Any]


@dataclass
class Subject:
    """A model in float32, its linears' weights, what one prompt and the calibration text showed, and the texts."""

    model: nn.Module
    weights: Mapping[str, Tensor]
    energies: Mapping[str, Tensor]
    peaks: Mapping[str, Tensor]
    calibrated: Mapping[str, Tensor]
    norms: Mapping[str, str]
    windows: Mapping[str, Windows]
    reference: Mapping[str, list[Tensor]]

    def put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.model.get_submodule(name).weight.copy_(weight)

    def score(self, runner: Any = None) -> Record:
        """Text -> perplexity and KL, of the model or of another that runs like it."""
        result: Record = {}
        for name, windows in self.windows.items():
            scores = []
            for ids, reference in zip(windows.ids, self.reference[name], strict=True):
                logits, targets = window_logits(runner or self.model, ids, windows.bos)
                scores.append(score_window(logits.float(), targets, reference))
            tokens = sum(score.tokens for score in scores)
            result[name] = {
                "perplexity": perplexity_of(sum(score.nll for score in scores) / tokens),
                "kl": sum(score.kl for score in scores) / tokens,
                "tokens": tokens,
            }
        return result


def largest_inputs(model: Any, names: Mapping[str, object], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Module -> max|X| [in] over the calibration text."""
    file, window, count = CALIBRATION
    peaks: dict[str, Tensor] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            peak = args[0].abs().flatten(0, -2).amax(dim=0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    windows = make_windows(checkpoint, file.read_text("utf-8"), window, count)
    for ids in windows.ids:
        inputs = ids if windows.bos is None else torch.cat([torch.tensor([windows.bos]), ids])
        model.base_model(input_ids=inputs.unsqueeze(0), use_cache=False)  # without logits, which nobody looks at
    for hook in hooks:
        hook.remove()
    return peaks


def load(key: str, checkpoint: Checkpoint) -> Subject:
    model = build_model(checkpoint, torch.float32)
    found = find_super_weights(checkpoint, model=model)
    linears = {linear.module: found.probe.linears[linear.watch] for linear in found.architecture.weights.values()}
    windows, reference = {}, {}
    for name, (file, sizes) in TEXTS.items():
        window, count = sizes[key]
        windows[name] = make_windows(checkpoint, file.read_text("utf-8"), fit_window(checkpoint, window), count)
        reference[name] = [window_logits(model, ids, windows[name].bos)[0] for ids in windows[name].ids]
    return Subject(
        model,
        {name: model.get_submodule(name).weight.detach().clone() for name in linears},
        {name: record.energy for name, record in linears.items()},
        {name: record.peaks for name, record in linears.items()},
        largest_inputs(model, linears, checkpoint),
        {name: record.norm for name, record in linears.items()},
        windows,
        reference,
    )


class Results:
    """One record per (model, weights, activations, method); in a file, if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[Record] = json.loads(path.read_text())["results"] if path and path.exists() else []

    def find(self, *key: str) -> Record | None:
        names = ("model", "weights", "activations", "method")
        return next((item for item in self.records if tuple(item[name] for name in names) == key), None)

    def put(self, key: tuple[str, str, str, str], texts: Record) -> None:
        print(" | ".join(key), *(f"{value['kl']:.4f}" for value in texts.values()), file=sys.stderr, flush=True)
        self.records.append(
            dict(zip(("model", "weights", "activations", "method"), key, strict=True)) | {"texts": texts}
        )
        if self.path:
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"machine": describe(), "results": self.records}, indent=1) + "\n")
            unfinished.replace(self.path)


@torch.no_grad()
def simulate(key: str, subject: Subject, results: Results) -> None:
    """All methods, weights and scales that are not known yet."""
    rounder = Rounder(subject.model, subject.weights)
    if results.find(key, "float", "float", "original") is None:
        results.put((key, "float", "float", "original"), subject.score())
    smooth_scales = smoothing(subject.weights, subject.calibrated, subject.norms)
    jobs: list[tuple[str, Method | None]] = [
        ("float", None),
        *((scale, method) for scale in SCALES for method in METHODS),
    ]
    for bits in BITS:
        for smooth in (False, True):
            todo = [
                (name, scale, method)
                for scale, method in jobs
                if (method.smooth if method else False) == smooth
                and not results.find(*(name := (key, f"W{bits}", scale, method.name if method else "weights alone")))
            ]
            if not todo:
                continue
            scales = smooth_scales if smooth else {}
            subject.put(round_weights(subject.weights, bits, subject.energies, scales))
            for name, scale, method in todo:
                keep = method.keep(subject.peaks) if method else None
                with rounder.active(keep, per_token=scale == "per-token", scales=scales):
                    results.put(name, subject.score())
    subject.put(subject.weights)


def torch_dynamic(subject: Subject) -> Any:
    """torch.ao's dynamic quantization of every nn.Linear, in place of which it puts int8 products."""
    return torch.ao.quantization.quantize_dynamic(subject.model, {nn.Linear}, dtype=torch.qint8)


@contextmanager
def runtime_dynamic(subject: Subject, checkpoint: Checkpoint) -> Iterator[Any]:
    """ONNX Runtime's quantize_dynamic of the float graph, with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    from exporters.onnx.files import MODEL
    from exporters.onnx.write import save
    from swquant.export.onnx.graph import dynamo_graph
    from swquant.models.onnx_model import OnnxModel

    with tempfile.TemporaryDirectory(prefix="swquant-activations-") as scratch:
        folder = Path(scratch) / "float"
        folder.mkdir()
        save(dynamo_graph(subject.model, {}, "float", 0), folder)
        quantize_dynamic(folder / MODEL, Path(scratch) / "int8.onnx", use_external_data_format=True)
        yield OnnxModel.open(Path(scratch) / "int8.onnx", checkpoint.config)


@torch.no_grad()
def as_users(key: str, subject: Subject, checkpoint: Checkpoint, results: Results) -> None:
    name = (key, "int8", "per-tensor", "ONNX Runtime quantize_dynamic")
    if not results.find(*name):
        with runtime_dynamic(subject, checkpoint) as model:
            results.put(name, subject.score(model))
    name = (key, "int8", "per-tensor", "torch quantize_dynamic")
    if not results.find(*name):
        results.put(name, subject.score(torch_dynamic(subject)))


def print_tables(results: Results) -> None:
    """For each model and number of bits: methods by row, one scale per tensor and per token side by side."""
    for key in dict.fromkeys(item["model"] for item in results.records):
        original = results.find(key, "float", "float", "original")
        assert original is not None
        texts = tuple(original["texts"])
        floats = ", ".join(
            f"{score['perplexity']:.2f} on {score['tokens']} tokens of {text}"
            for text, score in original["texts"].items()
        )
        for bits in BITS:
            alone = results.find(key, f"W{bits}", "float", "weights alone")
            beside = "" if alone is None else f"; with the weights alone rounded, KL {_kl(alone, texts)}"
            print(f"\n{key}, W{bits}A8. Perplexity of the original: {floats}{beside}\n")
            print("| method | reads | " + " | ".join(f"{scale}: perplexity | KL | regained" for scale in SCALES) + " |")
            print("|---|---|" + "---:|---:|---:|" * len(SCALES))
            for method in METHODS:
                cells = [_cells(results, (key, f"W{bits}", scale), method.name, texts) for scale in SCALES]
                print(f"| {method.name} | {method.text} | {' | '.join(cells)} |")
        for item in results.records:
            if item["model"] == key and item["weights"] == "int8":
                print(f"\n{item['method']}: perplexity {_perplexity(item, texts)}, KL {_kl(item, texts)}")


def _perplexity(record: Record, texts: tuple[str, ...]) -> str:
    return ", ".join(f"{record['texts'][text]['perplexity']:.2f}" for text in texts)


def _kl(record: Record, texts: tuple[str, ...]) -> str:
    return ", ".join(f"{record['texts'][text]['kl']:.4f}" for text in texts)


def _cells(results: Results, cell: tuple[str, str, str], name: str, texts: tuple[str, ...]) -> str:
    """Perplexity, KL and what is regained of a method, on all texts."""
    record, naive, smooth = (results.find(*cell, other) for other in (name, "naive", "SmoothQuant"))
    if record is None:
        return " |  | "
    regained = ""
    if naive and smooth and record not in (naive, smooth):
        gains = [
            (naive["texts"][text]["kl"] - record["texts"][text]["kl"])
            / (naive["texts"][text]["kl"] - smooth["texts"][text]["kl"])
            for text in texts
        ]
        regained = ", ".join(f"{gain:.0%}" for gain in gains)
    return f"{_perplexity(record, texts)} | {_kl(record, texts)} | {regained}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of INT8 activations.")
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="SmolLM2-135M-Instruct")
    parser.add_argument("--gemma", type=Path, metavar="GGUF", help="Gemma 3 270M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="remember results there, and go on from them")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: torch's own choice")
    parser.add_argument("--simulated-only", action="store_true", help="leave out torch's and ONNX Runtime's own")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what --json holds")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = Results(options.json)
    for key in ("smollm2", "gemma") if not options.tables else ():
        if (gguf := getattr(options, key)) is None:
            continue
        with tempfile.TemporaryDirectory(prefix="swquant-activations-") as scratch:
            break_and_check(gguf, Path(scratch) / key)
            with open_checkpoint(Path(scratch) / key) as checkpoint, torch.no_grad():
                subject = load(key, checkpoint)
                simulate(key, subject, results)
                if not options.simulated_only:
                    as_users(key, subject, checkpoint, results)
    print_tables(results)


if __name__ == "__main__":
    main()
