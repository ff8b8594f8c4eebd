"""Task after task: what a pool of sets learns, forgets and takes, by who decides whether a set is reused or grown.

Six tasks come in an order, each is learned by `swquant adapt`'s own code, and after every task all tasks so far are
measured with the set that serves them, on text that no step saw:

    wiki, python, topics       perplexity: WikiText-2, the standard library's source, the documents of its topics
    dates, numbers, units      exact match of the response: June 5, 1987 -> 1987-06-05; words -> digits; 3.2 km -> m

    lw2g      gradients decide                       grow     a set for each task
    one       one set for all, nothing is kept       random   reuse or growth drawn, as often as lw2g grew
    soft      lw2g, steps kept off the base's text   joint    one set, all tasks at once: the bound

    python benchmarks/continual.py CHECKPOINT --json continual.json [--methods …] [--seeds 0 1 2] [--orders …]

Forgetting is how much worse a task is at the end than right after it was learned: in nats per token. `auto` is the
share of held-out windows that the input alone sends to the task's own set; `outside`, what a text of no task costs with
the pool beside the base, in perplexity. Of lw2g also: how many decisions random spaces of the same ranks share, what is
decided about each task when it comes a second time (reuse is right), and about a task that answers the same questions
otherwise (growth is right). A row is written into the JSON file when it is done; another run goes on from there, and
one that fails is said and left out. Several processes share the work by orders and seeds, each with a JSON file of its
own; `--tables --json a.json b.json …` prints what all say. Seconds are those of the processors, on a GPU the clock's.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import Cells, card, clock
from continual_report import said_of, table
from tasks import FORMATS, TEXTS, lines_of, measured, spaced, texts_of

from exporters.pool_file import BASE, StoredSet
from swquant.adapt.decide import decide
from swquant.adapt.learning import learn
from swquant.adapt.options import AdaptOptions
from swquant.adapt.pipeline import open_workshop
from swquant.adapt.plan import AdaptPlan, Task, make_plan
from swquant.adapt.workshop import Workshop
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.devices import device_for
from swquant.models.routing import choose
from swquant.progress import silent
from swquant.training.data import Corpus, conversations, text_windows
from swquant.training.loop import State

TASKS = ("wiki", "dates", "python", "numbers", "topics", "units")
METHODS = ("lw2g", "grow", "one", "random", "joint", "soft")


@dataclass(frozen=True)
class Material:
    """Of one task: what it learns from, the same again from other text, and what it is tested with."""

    learned: Corpus
    again: Corpus
    test: Corpus


def material(checkpoint: CompressedCheckpoint, task: str, args: argparse.Namespace, folder: Path) -> Material:
    window, count = args.window, args.train
    if task in FORMATS:
        made, known = [], set()
        for name, size, seed in (("learned", count, 1), ("again", count, 2), ("test", args.test * 4, 3)):
            path = folder / f"{task}-{name}.jsonl"
            lines = lines_of(task, size, seed).splitlines()
            if name == "test":  # there are only some hundred units
                lines = [line for line in lines if line not in known]
            known.update(lines if name == "learned" else ())
            path.write_text("\n".join(lines))
            made.append(conversations(checkpoint, path, window))
        return Material(*made)
    train, test = texts_of(task)
    whole = text_windows(checkpoint, train, window, task)
    parts = [Corpus(task, whole.sequences[start::2][:count], whole.pad) for start in (0, 1)]
    tested = text_windows(checkpoint, test, window, task)
    return Material(*parts, spaced(tested, args.test))


def set_for(shop: Workshop, task: str) -> StoredSet:
    return next(stored for stored in shop.sets.values() if task in stored.record["tasks"])


class Row:
    """One method, one order, one seed."""

    def __init__(self, plan: AdaptPlan, shop: Workshop, world: Mapping[str, Material], folder: Path) -> None:
        self.plan, self.shop, self.world, self.folder = plan, shop, world, folder
        self.measures: list[dict[str, dict[str, float]]] = []
        self.decisions: dict[str, Any] = {}

    def learn(self, name: str, corpus: Corpus, served: list[str], steps: int | None = None) -> None:
        plan = self.plan if steps is None else replace(self.plan, options=replace(self.plan.options, steps=steps))
        self.shop.options = plan.options
        state = State(self.folder / "state", "")
        stored = learn(plan, self.shop, Task(name, corpus), len(self.measures), state, silent)
        self.shop.sets[stored.name] = stored
        self.decisions[name] = stored.record["tasks"][name]["decision"]
        last = self.measures[-1] if self.measures else {}
        now = {}
        for task in served:
            own = set_for(self.shop, task if task in stored_tasks(self.shop) else name)
            if own.name == stored.name or task not in last:
                with self.shop.laid(own.blocks):
                    now[task] = measured(self.shop.model, self.world[task].test)
            else:
                now[task] = last[task]
        self.measures.append(now)

    def result(self, order: list[str], seconds: float) -> dict[str, Any]:
        last = self.measures[-1]
        forgot = {}
        for task in order:
            first = next(stage[task] for stage in self.measures if task in stage)
            forgot[task] = last[task]["loss"] - first["loss"]
        return {
            "texts": [task for task in order if task in TEXTS],
            "formats": [task for task in order if task in FORMATS],
            "final": last,
            "forgotten": forgot,
            "sets": len(self.shop.sets),
            "bytes": sum(stored.record["bytes"] for stored in self.shop.sets.values()),
            "seconds": seconds,
            "device": card(self.shop.model.device),
            "decisions": self.decisions,
            "stages": self.measures,
        }


def stored_tasks(shop: Workshop) -> set[str]:
    return {task for stored in shop.sets.values() for task in stored.record["tasks"]}


def routed(row: Row) -> dict[str, Any]:
    """How often the input alone finds the task's own set, and what was chosen instead."""
    keys, found = row.shop.keys(), {}
    for task, item in row.world.items():
        own = set_for(row.shop, task).name
        chosen = [choose(keys, row.shop.model, ids) for ids, _ in item.test.sequences]
        right = sum(name != BASE and keys[name].set == own for name in chosen)
        found[task] = {"right": right / len(chosen), "chosen": {name: chosen.count(name) for name in set(chosen)}}
    return found


def outside(row: Row, corpus: Corpus) -> dict[str, float]:
    """Loss of a text of no task, window by window, with the base and with the set that the input chooses."""
    keys, total = row.shop.keys(), {"base": 0.0, "auto": 0.0}
    for ids, counted in corpus.sequences:
        one = Corpus("", ((ids, counted),))
        base = measured(row.shop.model, one)["loss"]
        task = choose(keys, row.shop.model, ids)
        total["base"] += base / len(corpus)
        if task == BASE:
            total["auto"] += base / len(corpus)
        else:
            with row.shop.laid(set_for(row.shop, task).blocks):
                total["auto"] += measured(row.shop.model, one)["loss"] / len(corpus)
    return total


def controls(row: Row, checkpoint: CompressedCheckpoint, args: argparse.Namespace) -> dict[str, Any]:
    """What is decided about tasks that came before, and about an opposite one."""
    found: dict[str, Any] = {}
    for task, item in row.world.items():
        decision = decide(row.shop, row.shop.session(*item.again.split()), f"{task}-again", 99)
        found[task] = {"action": decision["action"], "set": decision["set"], "own": set_for(row.shop, task).name}
    path = row.folder / "opposite.jsonl"
    path.write_text(lines_of("dates", args.train, 4, opposite=True))
    session = row.shop.session(*conversations(checkpoint, path, args.window).split())
    return {"again": found, "opposite": decide(row.shop, session, "opposite", 99)}


class Studio:
    """What all rows of a process share: the base, running, its own text, and the tasks."""

    def __init__(
        self, checkpoint: CompressedCheckpoint, args: argparse.Namespace, device: torch.device, folder: Path
    ) -> None:
        self.checkpoint, self.args, self.device, self.folder = checkpoint, args, device, folder
        self.world = {task: material(checkpoint, task, args, folder) for task in args.tasks}
        self.outside = outside_text(checkpoint, args)
        self._opened: dict[int, Workshop] = {}

    def plan(self, method: str, seed: int, growth: float) -> AdaptPlan:
        policy = {"joint": "grow", "soft": "lw2g"}.get(method, method)
        names = ("budget", "block", "steps", "lr", "batch", "window", "warmup", "texts", "energy")
        own = {name: getattr(self.args, name) for name in names}
        soft = self.args.soft if method == "soft" else 0.0
        return make_plan(self.checkpoint, [], AdaptOptions(policy=policy, seed=seed, growth=growth, soft=soft, **own))

    def workshop(self, plan: AdaptPlan) -> Workshop:
        """Without a set. What the base writes depends on the seed alone, and takes longer than a task."""
        seed = plan.options.seed
        if seed not in self._opened:
            self._opened = {seed: open_workshop(plan, None, silent, self.device)}
        return replace(self._opened[seed], options=plan.options, sets={})


def run(studio: Studio, method: str, order: list[str], seed: int, growth: float) -> dict[str, Any]:
    """A row."""
    args, world, plan = studio.args, studio.world, studio.plan(method, seed, growth)
    row = Row(plan, studio.workshop(plan), world, studio.folder)
    began = clock(studio.device)
    if method == "joint":
        longest = max(len(world[task].learned) for task in order)
        mixed = [world[task].learned.sequences[at] for at in range(longest) for task in order
                 if at < len(world[task].learned)]  # fmt: skip
        row.learn("joint", Corpus("all", tuple(mixed)), order, args.steps * len(order))
        return row.result(order, clock(studio.device) - began)
    for number, task in enumerate(order):
        row.learn(task, world[task].learned, order[: number + 1])
    found = row.result(order, clock(studio.device) - began)
    found |= {"auto": routed(row), "outside": outside(row, studio.outside)}
    if plan.options.policy == "lw2g":
        found |= controls(row, studio.checkpoint, args)
    return found


def outside_text(checkpoint: CompressedCheckpoint, args: argparse.Namespace) -> Corpus:
    """The license of Python, which no task has seen."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    text = path.read_text() if path.is_file() else __doc__ + (Path(__file__).parent.parent / "LICENSE").read_text()
    return spaced(text_windows(checkpoint, text, args.window, "outside"), args.test)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--json", type=Path, nargs="+", default=[Path("continual.json")], metavar="FILE",
                        help="rows go into the first; what is in any of them is not computed again")  # fmt: skip
    parser.add_argument("--tables", action="store_true", help="compute nothing; print what is there")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--orders", nargs="+", default=["forward"], choices=["forward", "reversed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="K")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=TASKS, help="needs texts and formats")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    for name, usual, text in (
        ("steps", 16, "of each task"), ("batch", 4, "windows per step"),
        ("window", 96, "tokens"), ("warmup", 4, "batches that decide"), ("texts", 8, "that the base writes"),
        ("train", 96, "windows or lines of each task"), ("test", 12, "windows; four times as many lines"),
        ("block", 64, "side"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=usual, help=text)
    parser.add_argument("--budget", default="0.1bits")
    parser.add_argument("--energy", type=float, default=0.9)
    parser.add_argument("--soft", type=float, default=0.5, help="of the method soft")
    parser.add_argument("--lr", default="2e-3", help="one rate for all, or auto")
    args = parser.parse_args()
    if args.checkpoint is None and not args.tables:
        parser.error("a checkpoint is needed, unless with --tables")
    return args


def main() -> None:
    args = arguments()
    device = device_for(args.device)
    kept = ("tasks", "steps", "batch", "window", "warmup", "texts", "train", "test", "block", "budget", "energy",
            "soft", "lr")  # fmt: skip
    settings = {key: getattr(args, key) for key in kept} | {"device": device.type}
    cells = Cells(args.json, None if args.tables else settings, card(device))
    if args.tables:
        print(table(cells.all, METHODS))
        return
    with CompressedCheckpoint(args.checkpoint) as checkpoint, tempfile.TemporaryDirectory() as name:
        studio = Studio(checkpoint, args, device, Path(name))
        for order, seed in product(args.orders, args.seeds):
            tasks = args.tasks[:: -1 if order == "reversed" else 1]
            for method in args.methods:
                growth = growth_of(cells.all.get(f"lw2g {order} {seed}"), len(tasks))
                cells.fill(f"{method} {order} {seed}", partial(run, studio, method, tasks, seed, growth), said_of)
    print(table(cells.all, METHODS))


def growth_of(decided: Mapping[str, Any] | None, tasks: int) -> float:
    """How often gradients let a set grow after the first, of a row; a half where there is none."""
    return 0.5 if decided is None or tasks < 2 else (decided["sets"] - 1) / (tasks - 1)


if __name__ == "__main__":
    main()
