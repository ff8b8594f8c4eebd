"""How much faster are several workers, and are the bytes those of one?

`swquant compress MODEL OUT --workers N` for every N, one after the other, on N cores: each worker has one thread, and
what only one process does (the prompt, the model's own text, its statistics, verifying) has N. Wall time is of the
whole command: run it on an idle machine. The exit status is 1 if any byte differs.

    python benchmarks/workers.py MODEL --preset best --workers 1 2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exporters.json_file import read_json


def compressed(model: str, out: Path, preset: str, workers: int) -> float:
    """Seconds of wall time."""
    command = [sys.executable, "-m", "swquant", "compress", model, str(out), "--preset", preset]
    begin = time.monotonic()
    subprocess.run(
        [*command, "--workers", str(workers)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(workers)},
        stdout=sys.stderr,
    )
    return time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    print("| workers | seconds | times as fast | same bytes |\n|---|---|---|---|")
    first: tuple[float, str] | None = None
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        for workers in given.workers:
            out = Path(folder) / f"with-{workers}"
            seconds = compressed(given.model, out, given.preset, workers)
            digest = read_json(out / "swquant/manifest.json")["digest"]  # over the hash of every byte
            first = first or (seconds, digest)
            differ |= digest != first[1]
            same = "yes" if digest == first[1] else "NO"
            print(f"| {workers} | {seconds:.1f} | {first[0] / seconds:.2f} | {same} |", flush=True)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
