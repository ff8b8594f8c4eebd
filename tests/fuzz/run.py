"""Mutants of every kind of file that swquant reads, and the real verbs run on each.

    PYTHONPATH=tests python -m fuzz.run [--first N] [--count N] [--seconds S] [--seed N] [--kind K] [--only N]

Everything is imported once; every mutant is a fork of this process with limits: 20 s for a verb, 2 GiB of memory. A
failure is one line: an exception other than SwquantError, a signal, a hang, too much memory, a message that is not one
line, a wrong acceptance (`judges`). It says how to run that mutant alone; `--only N` shows what the verbs printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads but its own

import torch
import typer
from fuzz.judges import Ran, judge, told_well
from fuzz.mutants import KINDS, Mutant, make_mutant, plan_mutant
from fuzz.worlds import TEXT, copied, make_worlds, prompt_of

import swquant
from exporters.errors import SwquantError
from swquant.cli import main as cli

HANG = 20.0  # seconds for a verb
MEMORY = 2 << 30  # bytes that a run may hold
_MORE = 3 << 30  # address space beside what this process has: a wall that a runaway hits before the machine does


@dataclass
class Tally:
    """What became of the mutants."""

    done: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0


def words_of(verb: str, mutant: Mutant, out: Path, text: Path) -> list[str]:
    """The command line of a verb."""
    prompt = prompt_of(mutant.world)
    words: dict[str, list[object]] = {
        "compress": ["compress", mutant.model, out, "--preset", "fast", "--block", "32", "--prompt", prompt],
        "detect": ["detect", mutant.model, "--prompt", prompt],
        "generate": ["generate", mutant.model, prompt, "--tokens", "4"],
        "eval": ["eval", mutant.model, "--text", text, "--window", "32"],
        "inspect": ["inspect", mutant.model],
        "verify": ["verify", mutant.model],
    }
    return [*map(str, words[verb]), *(["--json"] if mutant.as_json else [])]


def run_verb(verb: str, mutant: Mutant, place: Path) -> Ran:
    """Run a verb in this process, its streams in files: what C libraries print is caught, too."""
    streams = [os.open(place / f"{verb}.{name}", os.O_RDWR | os.O_CREAT) for name in ("out", "err")]
    kept = [os.dup(number) for number in (1, 2)]
    value, error, code = None, "", 0
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
    try:
        if verb == "load":
            value = swquant.load(mutant.model)
        else:
            cli(words_of(verb, mutant, place / "out", place / "text.txt"))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        behind = end.__context__ if code == 1 else None
        error = type(behind).__name__ if behind is not None and not isinstance(behind, SystemExit | typer.Exit) else ""
    except BaseException as failure:
        code, error = 1, type(failure).__name__
        sys.stderr.write(f"{failure}\n" if isinstance(failure, SwquantError) else traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    for number, stream in zip((1, 2), kept, strict=True):
        os.dup2(stream, number)
    out, err = ((place / f"{verb}.{name}").read_bytes().decode(errors="backslashreplace") for name in ("out", "err"))
    if verb == "load" and code:
        err = f"error: {err}"
    return Ran(verb, code, out, err, error, value)


def _inside(number: int, seed: int, kind: str | None, worlds: Mapping[str, Path], place: Path, pipe: int) -> None:
    """What the fork does: make the mutant, run its verbs, judge; all of it told through the pipe, a line each."""

    def tell(**words: object) -> None:
        os.write(pipe, json.dumps(words).encode() + b"\n")

    tempfile.tempdir = str(place)
    kind, world, rng = plan_mutant(number, seed, kind)
    tell(step="damage", kind=kind, world=world)
    mutant = make_mutant(number, kind, world, rng, copied(worlds[world], place / world))
    (place / "text.txt").write_text(TEXT)
    tell(what=mutant.what)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MORE, held + _MORE))
    ran: dict[str, Ran] = {}
    for verb in mutant.verbs:
        tell(step=verb)
        ran[verb] = run_verb(verb, mutant, place)
        tell(verb=verb, code=ran[verb].code, out=ran[verb].out[:3000], err=ran[verb].err[:3000])
        for problem in told_well(ran[verb], mutant.as_json or verb == "load"):
            tell(problem=f"{verb}: {problem}")
    tell(step="judging")
    try:
        for problem in judge(mutant, ran, worlds, place / "out"):
            tell(problem=problem)
    except Exception as error:  # what a judge cannot read has been accepted by a verb
        tell(problem=f"judge: {type(error).__name__}: {str(error)[:300]}")


def forked(
    number: int, seed: int, kind: str | None, worlds: Mapping[str, Path], place: Path
) -> Iterator[dict[str, Any]]:
    """Everything that a fork told, and at last how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            quiet = os.open(os.devnull, os.O_RDWR)
            os.dup2(quiet, 0)
            os.dup2(quiet, 2)
            _inside(number, seed, kind, worlds, place, write)
        except BaseException:
            os.write(write, json.dumps({"problem": f"fuzzer: {traceback.format_exc()[-1500:]}"}).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(write)
    rest, step, begin = b"", "start", time.monotonic()
    while True:
        if not select.select([read], [], [], max(0.0, begin + HANG * (1 + (step == "judging")) - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            yield {"problem": f"{step}: hangs longer than {HANG:.0f} s"}
            break
        if not (data := os.read(read, 1 << 16)):
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "step" in told:
                step, begin = told["step"], time.monotonic()
            elif "verb" in told:
                told["seconds"] = time.monotonic() - begin
            yield told
    os.close(read)
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        yield {"problem": f"{step}: ended by signal {os.WTERMSIG(status)}"}
    elif os.WIFSIGNALED(status):
        yield {"problem": f"{step}: killed"}
    yield {"memory": usage.ru_maxrss * 1024}


def run_mutant(
    number: int, seed: int, kind: str | None, worlds: Mapping[str, Path], work: Path, tally: Tally, show: bool
) -> None:
    """Run one mutant and write down what became of it."""
    place = work / f"mutant-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    what, problems, name = "", [], "?"
    for told in forked(number, seed, kind, worlds, place):
        name, what = told.get("kind", name), told.get("what", what)
        if show:
            print(json.dumps(told, indent=1))
        if "verb" in told:
            (tally.refused if told["code"] else tally.accepted)[f"{name} {told['verb']}"] += 1
            tally.slowest = max(tally.slowest, told["seconds"])
        if "memory" in told:
            tally.largest = max(tally.largest, told["memory"])
            if told["memory"] > MEMORY:
                problems.append(f"{told['memory'] >> 20} MiB of memory")
        if "problem" in told:
            problems.append(told["problem"])
    tally.done += 1
    again = f"--seed {seed} --only {number}" + (f" --kind {kind}" if kind else "")
    tally.failures += [f"{again}  [{name}] {what[:200]}  =>  {problem}" for problem in problems]
    for line in tally.failures[len(tally.failures) - len(problems) :]:
        print(line, flush=True)
    if not show:
        shutil.rmtree(place, ignore_errors=True)


def fuzz(
    work: Path,
    *,
    seed: int = 0,
    first: int = 0,
    count: int = 1500,
    seconds: float = 1e9,
    kind: str | None = None,
    show: bool = False,
) -> tuple[Tally, int]:
    """Run mutants `first` to `first + count`, or as many as there is time for. Returns what became of them, and the
    number of the next."""
    torch.set_num_threads(1)
    until = time.monotonic() + seconds
    if not (work / "worlds").is_dir():
        (work / "worlds").mkdir(parents=True)
        make_worlds(work / "worlds")
    worlds = {path.name: path for path in (work / "worlds").iterdir()}
    _warm(worlds, work)
    tally, number = Tally(), first
    while number < first + count and time.monotonic() < until:
        run_mutant(number, seed, kind, worlds, work, tally, show)
        number += 1
    return tally, number


def _warm(worlds: Mapping[str, Path], work: Path) -> None:
    """Import what the verbs import when they are first asked, before there are forks."""
    place = work / "warm"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / "text.txt").write_text(TEXT)
    for world, verbs in (
        ("source", ("compress", "detect", "generate", "eval")),
        ("gguf", ("detect",)),
        ("int8", ("inspect", "verify", "load")),
    ):
        mutant = Mutant(-1, world, world, worlds[world], "", verbs, True)
        for verb in verbs:
            ran = run_verb(verb, mutant, place)
            if ran.code:
                raise SystemExit(f"the sound {world} fails in {verb}: {ran.err}")
    shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="0: the mutants of the tests; -1: new ones")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--only", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    seed = given.seed if given.seed >= 0 else random.SystemRandom().randrange(1 << 30)
    work = given.work or Path(tempfile.mkdtemp(prefix="swquant-fuzz-"))
    first, count = (given.first, given.count) if given.only is None else (given.only, 1)
    print(f"seed {seed}, from {first}, in {work}", flush=True)
    begin = time.monotonic()
    tally, following = fuzz(
        work, seed=seed, first=first, count=count, seconds=given.seconds, kind=given.kind, show=given.only is not None
    )
    print(f"{tally.done} mutants in {time.monotonic() - begin:.0f} s, next --first {following}: {len(tally.failures)} failures; "
          f"slowest verb {tally.slowest:.1f} s, most memory {tally.largest >> 20} MiB")  # fmt: skip
    for key in sorted(tally.accepted.keys() | tally.refused.keys()):
        print(f"  {key}: {tally.accepted[key]} accepted, {tally.refused[key]} refused")
    if given.work is None:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
