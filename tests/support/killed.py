"""A program that kills runs of `compress` or `export` at many moments and looks at what is left.

    python tests/support/killed.py VERB MODEL FOLDER FIRST COUNT SECONDS

Everything is imported once; every run is a fork of this process, killed by SIGKILL. Even kills come at any moment of a
run, odd ones in the short time between the last check and the end, where OUT is exchanged and the old one deleted. Run
number N is always killed at the same share of a run's time, so FIRST goes on where an earlier call ended. Prints JSON.

A killed `compress` is then taken up, killed N % 3 times more while it is, and must end with the bytes of a run that
nobody killed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads but its own

import torch

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import pipeline
from swquant.compress.options import CompressOptions
from swquant.output.destination import unfinished
from swquant.output.resumable import leftover
from swquant.progress import Progress

PROMPT = "t5 t9 t17 t33 t64 t2 t81 t40 t11 t99"
LAST_STEPS = ("Verifying", "Running it beside")
GOLDEN = 0.6180339887498949


class Telling(Progress):
    """Says through a pipe that the last step has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        if text.startswith(LAST_STEPS):
            os.write(self.pipe, b"x")
        yield


def forked(run: Callable[[Progress], object]) -> tuple[int, int]:
    """Start a run in a process of its own. Returns its id, and a pipe that gives a byte when the last step begins."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    code = 1
    try:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if not os.environ.get("SWQUANT_KILLS_SHOW"):
            os.dup2(quiet, 2)
        run(Telling(write))
        code = 0
    finally:
        os._exit(code)


def whole(run: Callable[[Progress], object]) -> tuple[float, float]:
    """Seconds of a run that nobody kills, and of what follows after the last step has begun."""
    begin = time.monotonic()
    child, pipe = forked(run)
    os.read(pipe, 1)
    last = time.monotonic()
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("a run that nobody killed failed; SWQUANT_KILLS_SHOW=1 shows why")
    return time.monotonic() - begin, time.monotonic() - last


def killed(run: Callable[[Progress], object], number: int, seconds: float, last: float) -> bool:
    """Whether the kill came before the end."""
    child, pipe = forked(run)
    share = (number * GOLDEN) % 1
    if number % 2:
        os.read(pipe, 1)
        time.sleep(share * last * 1.1)
    else:
        time.sleep(share * seconds)
    os.kill(child, signal.SIGKILL)
    os.close(pipe)
    return os.waitpid(child, 0)[1] != 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(run: Callable[[Progress], object], number: int, seconds: float, last: float) -> bool:
    """Take a killed run up until it ends. Returns whether it ended well."""
    for again in range(number % 3):
        killed(run, 7 * number + 2 * again, seconds, last)
    child, pipe = forked(run)
    status = os.waitpid(child, 0)[1]
    os.close(pipe)  # not before: who writes into a pipe that nobody reads is killed
    return status == 0


def main(verb: str, model: Path, folder: Path, first: int, count: int, seconds: float) -> dict[str, object]:
    torch.set_num_threads(1)
    until = time.monotonic() + seconds
    place = folder / "place"
    place.mkdir(parents=True)
    out, new, source = place / "old", place / "new", folder / "checkpoint"

    def run_into(target: Path) -> Callable[[Progress], object]:
        if verb == "export":
            return lambda progress: swquant.export(source, target, overwrite=True, progress=progress)
        return lambda progress: pipeline.write(prepared, target, overwrite=True, progress=progress)

    if verb == "export":
        importlib.import_module("swquant.export.onnx.pipeline")  # what every run needs
        whole(lambda progress: swquant.compress(model, source, prompt=PROMPT, preset="fast", progress=progress))
    else:  # nothing is written before there is a plan
        options = CompressOptions(prompt=PROMPT, preset="fast", outliers=0.01)
        prepared = pipeline.prepare(open_checkpoint(model), options)
    whole(run_into(out))
    length, last = whole(run_into(out))
    expected = tree(out)
    found: dict[str, object] = {"kills": 0, "too late": 0, "broken": [], "lost": [], "debris": [], "other bytes": []}
    found |= {"taken up": 0}
    done = first
    while done < first + count and time.monotonic() < until:
        target = new if done % 4 > 1 else out
        if killed(run_into(target), done, length, last):
            found["kills"] += 1  # type: ignore[operator]
        else:
            found["too late"] += 1  # type: ignore[operator]
        with unfinished(folder / "place" / "next"):  # what the next run does first
            pass
        if verb == "compress":
            found["taken up"] += leftover(target) is not None  # type: ignore[operator]
            if not finished(run_into(target), done, length, last) or tree(target) != expected:
                found["other bytes"].append(done)  # type: ignore[attr-defined]
        if not out.is_dir():
            found["lost"].append(done)  # type: ignore[attr-defined]
        for result in (out, new):
            if result.is_dir() and (problems := swquant.verify(result)):
                found["broken"].append([done, problems[0]])  # type: ignore[attr-defined]
        if debris := sorted({path.name for path in place.iterdir()} - {"old", "new"}):
            found["debris"].append([done, debris])  # type: ignore[attr-defined]
        shutil.rmtree(new, ignore_errors=True)
        done += 1
    return {**found, "next": done}


if __name__ == "__main__":
    verb, model, folder, first, count, seconds = sys.argv[1:]
    print(json.dumps(main(verb, Path(model), Path(folder), int(first), int(count), float(seconds))))
