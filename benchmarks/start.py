"""What a command costs before it works: processor time (user + system) of whole processes on a small model.

    python benchmarks/start.py MODEL.gguf

runs `--help`, `inspect`, `detect` and `compress` with each preset in a process of its own, `--rounds` times, and
prints the least time of each. On a machine with something else to do seconds on the clock say little, and of processor
time the least comes nearest to what an idle one would need. `--against FOLDER` runs another checkout of swquant in
turn, so that both meet the same load; `--json FILE` keeps all numbers. The first run after an installation also
compiles the loops of `calibrationless.kernels` into numba's cache; `--cold` shows what that adds, with an empty one.
Run it where swquant is installed without the extra `bench`: transformers imports other quantizers where it finds them
(hqq, torchao), which takes every command a second or more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from machine import describe

HERE = Path(__file__).resolve().parents[1]


def seconds(words: Sequence[str], root: Path, cache: Path | None = None) -> float:
    """Processor time of `python -m swquant WORDS` out of the checkout `root`. cache: where numba keeps what it
    compiled, its own place if None. Raises SystemExit with what the command said where it fails."""
    environment = os.environ | {"PYTHONPATH": str(root)} | ({} if cache is None else {"NUMBA_CACHE_DIR": str(cache)})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "swquant", *words],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(f"swquant {' '.join(words)}: {run.stderr.strip()}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(model: Path, folder: Path, presets: Sequence[str]) -> dict[str, list[str]]:
    """What is measured -> its words, in the order in which they are run."""
    return {
        "--help": ["--help"],
        "detect": ["detect", str(model)],
        **{
            f"compress --preset {preset}": [
                "compress",
                str(model),
                str(folder / preset),
                "--preset",
                preset,
                "--overwrite",
            ]
            for preset in presets
        },
        "inspect": ["inspect", str(folder / presets[0])],
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--cold", action="store_true", help="once more with an empty cache of compiled loops")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    roots = {"this": HERE} | ({"before": options.against.resolve()} if options.against else {})
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="swquant-start-") as folder:
        measured = commands(options.model.resolve(), Path(folder), options.presets)
        for _ in range(options.rounds):
            for name, command in measured.items():
                for column, root in roots.items():
                    times.setdefault(name, {}).setdefault(column, []).append(seconds(command, root))
        if options.cold:
            name = f"compress --preset {options.presets[-1]}"
            cold = seconds(measured[name], HERE, Path(folder) / "cache")
            times[f"{name}, nothing compiled"] = {"this": [cold]}
    show(times, tuple(roots))
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "seconds": times}, indent=1) + "\n")


def show(times: dict[str, dict[str, list[float]]], columns: Sequence[str]) -> None:
    """A Markdown table: the least of each, and in parentheses the median."""
    print(f"Processor seconds, least (median); load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"| command | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, by_column in times.items():
        cells = [
            f"{min(taken):.1f} ({statistics.median(taken):.1f})" if (taken := by_column.get(column)) else ""
            for column in columns
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
