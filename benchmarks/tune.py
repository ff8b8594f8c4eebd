"""Recovery without data: what a checkpoint wins back by training, method against method at equal bytes.

Every method gets the same checkpoint, the same text (which the original writes, or `--text`), the same steps and the
same bytes, and its own learning rate: the one of `--rates` with the least loss on held-out windows, since the rate
decides more than the method. It is chosen with the first seed; the others train with it alone. Methods:

    blocks by recovery, gradient, fisher   what `swquant tune --select …` trains
    blocks by random, diagonal             controls; diagonal blocks are what DiaBlo trains
    scales                                 what `swquant tune --train scales` trains: no bytes at all
    LoRA                                   peft's, of a rank that takes as many bytes at 16 bits, on every linear layer

    python benchmarks/tune.py CHECKPOINT ORIGINAL --json tuning.json [--steps N] [--methods …] [--seeds N]

Each (method, rate, seed) is written into the JSON file when it is done; another run goes on from there. KL is that of
`swquant eval` with the same window. Needs `pip install peft` for LoRA, which is left out without it, and says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.own_text import write_text
from swquant.evaluate.pipeline import make_windows, score_window, window_logits
from swquant.progress import silent
from swquant.training.data import begins_with, text_windows, token_windows
from swquant.training.loop import DivergedError, Schedule, train
from swquant.training.model import lay, trainable_model, trained_parameters
from swquant.tune.options import TuneOptions
from swquant.tune.plan import TunePlan, make_plan
from swquant.tune.selection import chosen, scores
from swquant.tune.session import Session

DATA = Path(__file__).parent.parent / "data"
BLOCKS = ("recovery", "gradient", "fisher", "random", "diagonal")
METHODS = (*BLOCKS, "scales", "lora")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


class World:
    """What all methods share: the plan, the original, and the text."""

    def __init__(
        self, checkpoint: Checkpoint, original: Checkpoint, options: TuneOptions, args: argparse.Namespace
    ) -> None:
        self.original = original
        text = None if args.text is None else (args.text.name, args.text.read_text())
        self.plan: TunePlan = make_plan(checkpoint, options, against=original, text=text)
        self.teacher = trainable_model(original)
        if text is None:
            torch.manual_seed(0)
            written = write_text(
                self.teacher, begins_with(original), 0, silent, texts=options.texts, length=options.window
            )
            self.corpus, self.held = token_windows(written, "own text").split()
        else:
            self.corpus, self.held = text_windows(original, text[1], options.window, text[0]).split()
        self.windows = make_windows(checkpoint, args.test.read_text(), args.test_window, args.windows)

    def session(self, model: Any, seed: int) -> Session:
        return Session(model, self.teacher, self.corpus, self.held, replace(self.plan.options, seed=seed))

    def kl(self, model: Any) -> float:
        """On the test text, against the original."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for ids in self.windows.ids:
                logits, targets = window_logits(model, ids, self.windows.bos)
                reference, _ = window_logits(self.teacher, ids, self.windows.bos)
                score = score_window(logits, targets, reference)
                total, tokens = total + score.kl, tokens + score.tokens
        return total / tokens


def blocks_of(world: World, select: str, seed: int) -> tuple[Any, Mapping[str, torch.nn.Parameter], int]:
    """(model, parameters, bytes) with blocks chosen by `select`."""
    plan = world.plan
    model = trainable_model(plan.checkpoint)
    losses = world.session(model, seed).warmup()
    found = scores(select, plan.pool, model, losses, checkpoint=plan.checkpoint, against=world.original, seed=seed)
    places = chosen(found, plan.pool, plan.count)
    layers = lay(model, plan.checkpoint, {name: plan.pool[name].weight for name in places}, places, packed=False)
    return model, {name: layer.values for name, layer in layers.items()}, plan.nbytes


def stored_scales(world: World) -> tuple[Any, Mapping[str, torch.nn.Parameter], int]:
    """The same with the stored scales and offsets of all candidates."""
    plan = world.plan
    model = trainable_model(plan.checkpoint)
    assert isinstance(plan.checkpoint, CompressedCheckpoint)
    rounded = [name for name in plan.checkpoint.quantized_names if name in plan.pool]
    weights = {name: candidate.weight for name, candidate in plan.pool.items()}
    return model, trained_parameters(lay(model, plan.checkpoint, weights, {}, scales=rounded)), 0


def made(world: World, method: str, seed: int) -> tuple[Any, Mapping[str, torch.nn.Parameter], int]:
    """(model, parameters, bytes) of a method."""
    if method == "scales":
        return stored_scales(world)
    return lora(world, seed) if method == "lora" else blocks_of(world, method, seed)


def lora(world: World, seed: int) -> tuple[Any, Mapping[str, torch.nn.Parameter], int]:
    """The same with peft's LoRA, alpha twice the rank, on all candidates."""
    from peft import LoraConfig, get_peft_model

    plan = world.plan
    per_rank = sum(2 * sum(candidate.shape) for candidate in plan.pool.values())
    rank = max(plan.nbytes // per_rank, 1)
    torch.manual_seed(seed)
    modules = [candidate.weight.module for candidate in plan.pool.values()]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, lora_dropout=0.0)
    model = get_peft_model(trainable_model(plan.checkpoint), config).eval()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model, parameters, rank * per_rank


def run(world: World, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once. Losses are nats per token; seconds are those of this process's processors, per step."""
    model, parameters, nbytes = made(world, method, seed)
    session, began = world.session(model, seed), time.process_time()
    try:
        train(parameters, session.loss_of, Schedule(world.plan.options.steps, rate))
    except DivergedError:
        return {"held_out": None, "kl": None, "bytes": nbytes, "seconds": None}
    seconds = (time.process_time() - began) / world.plan.options.steps
    with torch.no_grad():
        for parameter in parameters.values() if method != "scales" else ():  # those are stored as they were trained
            parameter.copy_(parameter.to(torch.bfloat16))
    return {"held_out": session.held_out(), "kl": world.kl(model), "bytes": nbytes, "seconds": seconds}


def best_rate(results: Mapping[str, Any], method: str, rates: list[float]) -> float | None:
    """The rate with the least held-out loss of the first seed; None where none has been tried, or all diverged."""
    cells = {rate: results.get(f"{method} {rate:g} 0") for rate in rates}
    held = {rate: cell["held_out"] for rate, cell in cells.items() if cell and cell["held_out"] is not None}
    return min(held, key=held.__getitem__, default=None)


def table(results: Mapping[str, Any], methods: list[str], rates: list[float], seeds: int) -> str:
    """Markdown: each method at its own best rate, mean ± standard deviation over the seeds."""
    lines = [
        "| method | bytes | rate | held-out KL | KL on the test text | seconds per step |",
        "|---|---|---|---|---|---|",
    ]
    before = results.get("before")
    if before:
        lines.append(f"| before | | | {before['held_out']:.4f} | {before['kl']:.4f} | |")
    for method in methods:
        rate = best_rate(results, method, rates)
        if rate is None:
            continue
        row = [cell for seed in range(seeds) if (cell := results.get(f"{method} {rate:g} {seed}")) and cell["kl"]]
        held, kl, seconds = ([cell[key] for cell in row] for key in ("held_out", "kl", "seconds"))
        spread = f" ± {statistics.stdev(kl):.4f}" if len(kl) > 1 else ""
        lines.append(
            f"| {method} | {row[0]['bytes']:,} | {rate:g} | {statistics.mean(held):.4f} | {statistics.mean(kl):.4f}{spread} "
            f"| {statistics.median(seconds):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("original")
    parser.add_argument("--json", type=Path, default=Path("tuning.json"))
    parser.add_argument("--text", type=Path, help="train on this text; what the original writes unless given")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext2-excerpt.txt")
    parser.add_argument("--test-window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--budget", default="0.1bits")
    parser.add_argument("--block", type=int, default=64)
    for name, usual in (("steps", 40), ("texts", 64), ("window", 256), ("batch", 2), ("seeds", 1)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[*RATES])
    args = parser.parse_args()
    if "lora" in args.methods and importlib.util.find_spec("peft") is None:
        print("LoRA is left out: pip install peft")
        args.methods.remove("lora")
    own = {key: getattr(args, key) for key in ("budget", "block", "steps", "texts", "window", "batch")}
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"settings": own}
    if results["settings"] != own:
        raise SystemExit(f"{args.json} holds results of other settings: {results['settings']}")
    with open_checkpoint(args.checkpoint) as checkpoint, open_checkpoint(args.original) as original:
        world = World(checkpoint, original, TuneOptions(**own), args)

        def done(key: str, cell: dict[str, Any]) -> None:
            results[key] = cell
            args.json.write_text(json.dumps(results, indent=1))
            print(key, cell, flush=True)

        if "before" not in results:
            model = trainable_model(checkpoint)
            done("before", {"held_out": world.session(model, 0).held_out(), "kl": world.kl(model)})
        for seed in range(args.seeds):
            for method in args.methods:
                best = best_rate(results, method, args.rates) if seed else None
                for rate in args.rates if best is None else [best]:
                    if f"{method} {rate:g} {seed}" not in results:
                        done(f"{method} {rate:g} {seed}", run(world, method, rate, seed))
    print(table(results, args.methods, args.rates, args.seeds))


if __name__ == "__main__":
    main()
