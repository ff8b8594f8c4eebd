"""What training a few blocks wins, method against method at equal bytes, each at its own best learning rate.

Every method gets the same checkpoint, the same text in the same order, the same steps and the same bytes. The rate
decides more than the method, so each has its own grid (`tuning/methods.py`), of which the rate with the least loss on
held-out windows is taken; where that is an end of the grid, the next one is tried, too (--more). It is chosen with the
first seed; the others train with it alone.

    tasks      recovery (KL from the original), python (loss on other files), dates, numbers, units (exact match);
               `tuning/world.py` says what they learn from and are tested with
    methods    blocks by recovery, gradient, fisher, random, diagonal; scales; full; peft's LoRA, DoRA, MiSS, SHiRA,
               SHiRA where our blocks lie, SUPERTUNING
    --budgets  several draw quality against bytes; --from, the layers that blocks and adapters lie in
    --speed    time per step and memory alone, nothing else: run it on a machine that is idle

    python benchmarks/tune.py CHECKPOINT ORIGINAL --json tuning.json [--task python] [--methods …] [--device cuda]
    python benchmarks/tune.py --json one.json two.json --tables

Each cell (task, method, budget, layers, rate, seed) is written into the first JSON file when it is done; another run
goes on from there. The other files are read beside it, so that several processes can share the work of one table: each
takes methods of its own, and a file of its own. Needs `pip install peft` for its methods; what it lacks is left out,
and said.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, card
from tuning.methods import METHODS, missing
from tuning.report import draw, tables
from tuning.results import Case, best_rate, rates_to_try, said
from tuning.training import before, speed, trained
from tuning.world import TASKS, World

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.models.devices import device_for

DATA = Path(__file__).parent.parent / "data"
FAST = ("blocks", "lora", "dora", "shira", "supertuning", "full")  # of --speed
NUMBERS = {
    "steps": (60, "of training"), "texts": (64, "windows to learn from, an eighth of them held out"),
    "window": (256, "tokens of one"), "batch": (2, "windows per step; of a format, four lines for one"),
    "warmup": (8, "batches that choose the blocks"), "block": (64, "side"), "seeds": (1, "how many"),
    "windows": (8, "of the test text"), "test-window": (512, "tokens of one"), "lines": (128, "of a format, to test with"),
    "more": (2, "rates beyond the ends of a grid"), "timed": (25, "steps of --speed, five more before them"),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("original", nargs="?")
    parser.add_argument(
        "--json", type=Path, nargs="+", default=[Path("tuning.json")], help="to write, and more to read"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print those of the files, of any settings; train nothing"
    )
    parser.add_argument("--plots", type=Path, help="draw quality against bytes into this folder")
    parser.add_argument("--task", nargs="+", default=["recovery"], choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, help="for all methods, instead of their own grids")
    parser.add_argument("--budgets", nargs="+", default=["0.1bits"])
    parser.add_argument("--from", dest="pools", nargs="+", default=["all"], choices=["attention", "mlp", "all"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--text", type=Path, help="recover on this text; what the original writes unless given")
    parser.add_argument("--own-text", type=Path, help="file to keep what the original writes in, for other runs")
    parser.add_argument("--test", type=Path, default=DATA / "wikitext2-excerpt.txt")
    for name, (usual, what) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{what}; {usual} unless given")
    args = parser.parse_args()
    if not args.tables and args.original is None:
        parser.error("name the checkpoint and the original")
    return args


def settings_of(args: argparse.Namespace, checkpoint: Checkpoint, original: Checkpoint) -> dict[str, Any]:
    """What all cells of a file depend on."""
    names = ("steps", "texts", "window", "batch", "warmup", "block", "windows", "test_window", "lines", "precision")
    found = {name: getattr(args, name) for name in names}
    found |= {"test": args.test.name, "text": args.text.name if args.text else None, "name": checkpoint.name}
    return {**found, "checkpoint": checkpoint.fingerprint[:16], "original": original.fingerprint[:16]}


def usable(methods: list[str]) -> list[str]:
    """Those that are installed; what is left out is said."""
    if gone := [method for method in methods if method in METHODS and missing(method)]:
        print(f"left out, not in the installed peft (pip install peft): {', '.join(gone)}", flush=True)
    return [method for method in methods if method not in gone]


def quality(world: World, cells: Cells, args: argparse.Namespace) -> None:
    """All cells: of every case all methods, the first seed of each with every rate, then the other seeds."""
    methods = usable(args.methods)
    cases = [Case(task, budget, pool) for task in args.task for budget in args.budgets for pool in args.pools]
    for case in cases:
        start = {"task": case.task, "method": "before"}
        cells.fill(f"{case.task} before", lambda case=case, start=start: {**start, **before(world, case)}, said)

    def cell(case: Case, method: str, rate: float, seed: int) -> None:
        facts = {**asdict(case), "method": method, "rate": rate, "seed": seed}
        cells.fill(case.key(method, rate, seed), lambda: {**facts, **trained(world, case, method, rate, seed)}, said)

    for case in cases:
        for method in methods:
            grid = args.rates or METHODS[method].rates
            failed: set[float] = set()
            while left := [
                rate for rate in rates_to_try(cells.all, case, method, grid, args.more) if rate not in failed
            ]:
                cell(case, method, left[0], 0)
                failed.add(left[0])  # or done, and not left any more
        for seed in range(1, args.seeds):
            for method in methods:
                rate = best_rate(cells.all, case, method)
                if rate is not None:
                    cell(case, method, rate, seed)


def speeds(world: World, cells: Cells, args: argparse.Namespace) -> None:
    """Table 1."""
    for budget, precision in itertools.product(args.budgets, ("float32", "bfloat16")):
        case = Case("python", budget, args.pools[0])
        for method in usable([*FAST]):
            facts = {"method": method, "precision": precision, "budget": budget}
            key = f"speed {method} {budget} {precision}"
            timed = partial(speed, world, case, method, precision, args.timed)
            cells.fill(key, lambda facts=facts, timed=timed: {**facts, **timed()}, said)


def print_tables(paths: list[Path], plots: Path | None) -> None:
    """Of all files, those of the same settings together; and charts."""
    groups: dict[str, dict[str, Any]] = {}
    for path in paths:
        content = json.loads(path.read_text())
        groups.setdefault(json.dumps(content["settings"]), {}).update(content["cells"])
    for settings, cells in groups.items():
        name = json.loads(settings)["name"]
        print(f"\n# {name}\n\n{settings}\n\n{tables(cells)}")
        for path in draw(cells, plots, name) if plots is not None else ():
            print(f"\nDrew {path}")


def main() -> None:
    args = arguments()
    if not args.tables:
        device = device_for(args.device)
        with open_checkpoint(args.checkpoint) as checkpoint, open_checkpoint(args.original) as original:
            settings = settings_of(args, checkpoint, original)
            cells = Cells(args.json, settings, card(device))
            (speeds if args.speed else quality)(World(checkpoint, original, args, device), cells, args)
    print_tables([path for path in args.json if path.exists()], args.plots)


if __name__ == "__main__":
    main()
