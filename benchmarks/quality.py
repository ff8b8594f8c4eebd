"""How much of a model survives 4 and 3 bits without data: swquant beside other tools, at the bits that they store.

Three small models, and in every cell of the table the same bits and block. Each method turns the same linear weights
(all those of the decoder layers) into the weights that its stored form decodes to; embeddings, norms and head stay as
they are. Then swquant's evaluator reads the same windows of text with all of them.

    models      two are GGUF files (SmolLM2 135M and Gemma 3 270M) whose weights lie on a 4-bit grid already. `grid.py`
                takes them off it first, and checks that they still compute the same function: that is the original of
                every row, in float32. The third never lay on any grid: `trained.py` made it, and it is read as it is
    texts       the beginning of WikiText-2's test set, and Python source: of another kind, so that a method
                that suits one text only shows. No method sees either of them
    calibrated  methods marked so have read the beginning of WikiText-2's validation set (--calibration), 16
                windows of 256 tokens; all others have read no text, swquant's own ten-word prompt aside
    bits        all that is stored for the linear weights, in bits per weight, see `peers.base`
    KL          of the original's predictions from the method's, in nats, mean over all predicted tokens.
                Rows are sorted by it: it is far less noisy than perplexity on texts this short
    closed      share of the perplexity that asymmetric min/max rounding adds to the original's, in the same
                cell, that the method takes away again; and the same of KL
    block       where it does not divide a row, half of it is taken, and so on, by every method. Types of a fixed
                block (llama.cpp's) stand in the cell nearest in bits

A peer that is not installed, or fails, is listed with the reason. With --json a run remembers what it has measured, by
versions and protocol, and goes on from there. Figures are drawn from the same file.

    python benchmarks/quality.py --smollm2 MODEL.gguf --gemma MODEL.gguf --trained FOLDER --json FILE --plots FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from grid import break_and_check
from machine import describe
from peers import METHODS, Cell, Method, Original, missing, open_original, versions
from quality_report import draw, tables
from torch import Tensor

from swquant.evaluate.pipeline import Windows, fit_window, make_windows, perplexity_of, score_window, window_logits
from swquant.models.loading import build_model

DATA = Path(__file__).parent.parent / "data"
SOURCES = Path(__file__).parent.parent
# What decides how swquant rounds a weight.
ROUNDING = (
    "calibrationless/*.py",
    *(f"swquant/compress/{name}.py" for name in ("choice", "evidence", "plan", "tensor")),
    *(f"swquant/detect/{name}.py" for name in ("folds", "own_text", "pipeline")),
)
CHOICES = list(dict.fromkeys(str(cell) for method in METHODS for cell in method.cells))
Record = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """window: tokens. windows: how many of them, by model: a token of a large vocabulary takes longer.

    small: how many of them for models of another name, which take few tokens at a time, and little time.
    """

    name: str
    file: Path
    window: int
    windows: dict[str, int]
    small: int

    def counts(self, key: str) -> dict[str, int]:
        """The windows of a model, among those of the models that it is measured with."""
        return self.windows if key in self.windows else {key: self.small}

    def times(self, factor: int) -> Text:
        more = {key: factor * count for key, count in self.windows.items()}
        return replace(self, windows=more, small=factor * self.small)


TEXTS = (
    Text("wikitext2-test", DATA / "wikitext2-excerpt.txt", 1024, {"smollm2": 2, "gemma": 1}, 16),
    Text("python", DATA / "python-source.txt", 512, {"smollm2": 1, "gemma": 1}, 8),
)


class Evaluator:
    """One model in memory, whose linear weights are replaced, and the original's logits on every window."""

    def __init__(self, key: str, original: Original, texts: Sequence[Text]) -> None:
        self.original = original
        self.model = build_model(original.checkpoint, torch.float32)
        self.changed: set[str] = set()
        self.windows: dict[str, Windows] = {}
        self.reference: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for text in texts:
                window = fit_window(original.checkpoint, text.window)
                windows = make_windows(original.checkpoint, text.file.read_text("utf-8"), window, text.counts(key)[key])
                self.windows[text.name] = windows
                self.reference[text.name] = [window_logits(self.model, ids, windows.bos)[0] for ids in windows.ids]

    def measure(self, state: dict[str, Tensor]) -> dict[str, Record]:
        """Text -> perplexity, kl, top1, accepted and tokens with these weights in place of the original's."""
        with torch.no_grad():
            for name in {*self.original.linears, *self.changed, *state}:
                new = state[name] if name in state else self.original.checkpoint.read(name)
                self.model.get_parameter(name).copy_(new)
            self.changed = set(state)
            return {name: self._score(name) for name in self.windows}

    def _score(self, name: str) -> Record:
        windows = self.windows[name]
        scores = []
        for ids, reference in zip(windows.ids, self.reference[name], strict=True):
            logits, targets = window_logits(self.model, ids, windows.bos)
            scores.append(score_window(logits, targets, reference))
        tokens = sum(score.tokens for score in scores)
        perplexity = perplexity_of(sum(score.nll for score in scores) / tokens)
        return {
            "perplexity": perplexity if perplexity < 1e30 else None,
            "kl": sum(score.kl for score in scores) / tokens,
            "top1": sum(score.agree for score in scores) / tokens,
            "accepted": sum(score.accepted for score in scores) / tokens,
            "tokens": tokens,
        }


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def identity(method: Method, key: str, model: Record, calibration: str, texts: Sequence[Text]) -> Record:
    """What a result depends on: a recorded one with another identity is measured again. Raises PackageNotFoundError."""
    result: Record = versions(("torch", "transformers", *method.packages)) | model
    if method.name.startswith("swquant"):
        result["sources"] = digest(*(path.read_bytes() for part in ROUNDING for path in sorted(SOURCES.glob(part))))
        result["call"] = method.call
    if method.calibrated:
        result["calibration"] = digest(calibration.encode())
    result["texts"] = digest(*(f"{text.window} {text.counts(key)}".encode() + text.file.read_bytes() for text in texts))
    return result


def measure(method: Method, cell: Cell, original: Original, evaluator: Evaluator) -> Record:
    start = time.perf_counter()
    outcome = method.run(original, cell)
    seconds = time.perf_counter() - start
    bits = 8 * outcome.nbytes / original.weights
    return {"bits": bits, "texts": evaluator.measure(outcome.state), "seconds": seconds, "notes": outcome.notes}


class Results:
    """The JSON file: originals by model, and one record per (model, cell, method)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path and path.exists() else {}
        self.originals: dict[str, Record] = known.get("originals", {})
        self.records: list[Record] = known.get("results", [])

    def find(self, key: tuple[str, str, str]) -> Record | None:
        return next((item for item in self.records if (item["model"], item["cell"], item["method"]) == key), None)

    def put(self, record: Record) -> None:
        key = (record["model"], record["cell"], record["method"])
        self.records = [item for item in self.records if (item["model"], item["cell"], item["method"]) != key]
        self.records.append(record)
        self.save()

    def save(self) -> None:
        if self.path:
            content = {"machine": describe(), "originals": self.originals, "results": self.records}
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(content, indent=1) + "\n")
            unfinished.replace(self.path)


@contextmanager
def off_grid(gguf: Path, calibration: str) -> Iterator[tuple[Original, float]]:
    """The model off its grid, in a folder that is removed again, and the largest difference of a logit."""
    with tempfile.TemporaryDirectory(prefix="swquant-quality-") as scratch:
        _, difference = break_and_check(gguf, Path(scratch) / gguf.stem)
        with as_it_is(Path(scratch) / gguf.stem, calibration) as (original, _):
            yield original, difference


@contextmanager
def as_it_is(folder: Path, calibration: str) -> Iterator[tuple[Original, float]]:
    """A model that needs nothing done to it."""
    original = open_original(folder, calibration)
    try:
        yield original, 0.0
    finally:
        original.checkpoint.close()


@dataclass(frozen=True)
class Model:
    """One option of the command line. opened: from its path and the calibration text to an original.

    identity: what of its path belongs into the identity of a result.
    """

    metavar: str
    help: str
    opened: Callable[[Path, str], AbstractContextManager[tuple[Original, float]]]
    identity: Callable[[Path], Record] = lambda _: {}


def weights_of(folder: Path) -> Record:
    """A model trained again has the same name and other weights."""
    return {"weights": digest(*(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))}


MODELS = {
    "smollm2": Model("GGUF", "SmolLM2-135M-Instruct", off_grid),
    "gemma": Model("GGUF", "Gemma 3 270M", off_grid),
    "trained": Model("FOLDER", "what trained.py makes", as_it_is, weights_of),
}


def run(
    key: str,
    path: Path,
    jobs: Sequence[tuple[Method, Cell]],
    results: Results,
    calibration: str,
    texts: Sequence[Text],
) -> None:
    """Measure what is not known yet of one model."""
    todo: list[tuple[Method, Cell, Record]] = []
    model = MODELS[key].identity(path)
    for method, cell in jobs:
        try:
            wanted = identity(method, key, model, calibration, texts)
        except Exception as error:
            put_problem(results, key, cell, method, {}, error)
            continue
        known = results.find((key, str(cell), method.name))
        if known is None or known["identity"] != wanted or "problem" in known:
            todo.append((method, cell, wanted))
    if not todo:
        return
    with MODELS[key].opened(path, calibration) as (original, difference):
        evaluator = Evaluator(key, original, texts)
        results.originals[key] = {
            "name": original.checkpoint.name,
            "difference": difference,
            "weights": original.weights,
            "texts": evaluator.measure({}),
        }
        for number, (method, cell, wanted) in enumerate(todo, start=1):
            print(f"{key} {cell} {method.name} ({number} of {len(todo)})", file=sys.stderr, flush=True)
            try:
                record = measure(method, cell, original, evaluator)
            except Exception as error:  # a peer may fail in any way; its row says how
                put_problem(results, key, cell, method, wanted, error)
                continue
            results.put(row(key, cell, method, wanted) | record)


def row(key: str, cell: Cell, method: Method, wanted: Record) -> Record:
    names = {"model": key, "cell": str(cell), "method": method.name, "call": method.call}
    return names | {"calibrated": method.calibrated, "identity": wanted}


def put_problem(results: Results, key: str, cell: Cell, method: Method, wanted: Record, error: Exception) -> None:
    print(f"  {missing(error)}", file=sys.stderr, flush=True)
    results.put(row(key, cell, method, wanted) | {"problem": missing(error)})


def chosen(cells: Sequence[str], words: Sequence[str]) -> list[tuple[Method, Cell]]:
    """Every method in every cell that it has, as far as the filters let them through; in the order of `words`."""
    methods = dict.fromkeys(
        method for word in words or [""] for method in METHODS if word.lower() in method.name.lower()
    )
    return [(method, cell) for method in methods for cell in method.cells if not cells or str(cell) in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of 4-bit and 3-bit models, swquant and peers.")
    for key, model in MODELS.items():
        parser.add_argument(f"--{key}", type=Path, metavar=model.metavar, help=model.help)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="only these")
    parser.add_argument(
        "--cells", nargs="+", choices=CHOICES, default=[], metavar="CELL", help=f"only these of {', '.join(CHOICES)}"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="WORD", help="only methods whose name contains one, in this order"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", default=DATA / "wikitext2-valid-excerpt.txt")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="as many windows of text (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="remember results there, and go on from them")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw figures there")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: torch's own choice")
    options = parser.parse_args()
    models = {key: path for key in MODELS if (path := getattr(options, key)) is not None}
    if unknown := set(options.models or ()) - set(models):
        parser.error(f"--models {min(unknown)} needs --{min(unknown)} and its path")
    models = {key: path for key, path in models.items() if not options.models or key in options.models}
    if lost := [path for path in (*models.values(), options.calibration) if not path.exists()]:
        parser.error(f"{lost[0]}: not there")
    if options.threads:
        torch.set_num_threads(options.threads)
    results = Results(options.json)
    calibration = options.calibration.read_text("utf-8")
    texts = [text.times(options.times) for text in TEXTS]
    for key, path in models.items():
        run(key, path, chosen(options.cells, options.methods), results, calibration, texts)
    written = tables(results.originals, results.records)
    if options.tables:
        options.tables.write_text(written, encoding="utf-8")
    else:
        print(written, end="")
    if options.plots:
        draw(results.originals, results.records, options.plots)


if __name__ == "__main__":
    main()
