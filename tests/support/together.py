"""Commands in several processes that train together, in two ways.

`torchrun` and `accelerate` give the command line that a user types: every process waits for torch and transformers to
be imported. `forked` imports them once, in a program of its own, and forks it for every process; they meet as those of
torchrun do, by the same variables of the environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "Run", "accelerate", "ended", "environment", "forked", "torchrun"]

ROOT = Path(__file__).parents[2]
SECONDS = 240  # after which a run hangs


@dataclass(frozen=True)
class Run:
    """A command in so many processes, or, after "-c", lines of Python. others: what the last of them is told instead,
    where that is something else."""

    processes: int
    words: Sequence[object]
    others: Sequence[object] | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit code of every process (torchrun has one), and what all of them wrote."""

    codes: list[int]
    out: str
    err: str


def environment() -> dict[str, str]:
    """One thread each: sums go in the same order whatever the machine has."""
    silent = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as swquant.cli does, before torch is imported
    return {
        **os.environ,
        **silent,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }


def torchrun(processes: int, *words: object) -> list[str]:
    """What a user types to run swquant in so many processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*run, "-m", "swquant", *map(str, words)]


def accelerate(processes: int, *words: object) -> list[str]:
    """The same with accelerate."""
    run = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", str(processes)]
    return [*run, "-m", "swquant", *map(str, words)]


def ended(command: Sequence[str]) -> Ended:
    """Run a command line until it ends."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    return Ended([done.returncode], done.stdout, done.stderr)


def forked(*runs: Run) -> list[Ended]:
    """Do runs, one after the other."""
    told = [[run.processes, [*map(str, run.words)], [*map(str, run.others or run.words)]] for run in runs]
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(told), env=environment(), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Ended(*item) for item in json.loads(done.stdout.splitlines()[-1])]


def _child(rank: int, size: int, port: int, words: Sequence[str], out: int, err: int) -> None:
    """One process; never comes back."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        if size > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
        if words[0] == "-c":
            exec(words[1], {})
        else:
            from swquant.cli import main

            main(words)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _done(size: int, words: Sequence[str], others: Sequence[str]) -> tuple[list[int], str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        children = []
        for rank in range(size):
            told = others if rank == size - 1 else words
            if not (child := os.fork()):
                _child(rank, size, port, told, out.fileno(), err.fileno())
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return codes, *said


if __name__ == "__main__":
    import swquant.adapt.pipeline
    import swquant.cli.main
    import swquant.tune.pipeline
    import swquant.tune.plan  # noqa: F401

    print("\n" + json.dumps([_done(*run) for run in json.loads(sys.stdin.read())]))
