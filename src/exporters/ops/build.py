"""Compiles the operator library with the system's C++ compiler: `python -m exporters.ops.build`.

Installing swquant does the same (tools/build_operators.py). One command compiles everything; the instruction sets are
chosen by attributes inside the sources, so no file needs flags of its own and one library serves every x86-64 CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporters.ops import LIBRARY

__all__ = ["BuildError", "build_library", "find_compiler", "sources"]

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")


class BuildError(Exception):
    """There is no compiler, or it failed; the message holds what it said."""


def sources() -> list[Path]:
    """The C++ files of the library."""
    return sorted(FOLDER.glob("*.cc")) + sorted((FOLDER / "cpu").glob("*.cc"))


def find_compiler() -> str | None:
    """$CXX, or the first of c++, g++ and clang++ that is installed."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr.strip()}")


def build_library(target: Path = FOLDER / LIBRARY, flags: Sequence[str] = ()) -> Path:
    """Compiles the library to `target`, which appears when it is whole. `flags` come after the usual ones.

    Raises BuildError without a compiler, on a system other than Linux, and where the compiler does not succeed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or name one in CXX")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the operator library is built on Linux only, not on {sys.platform}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        whole = Path(folder) / target.name
        run([compiler, *FLAGS, *flags, *map(str, sources()), "-o", str(whole)])
        whole.replace(target)
    return target


def main() -> int:
    """Compiles the library beside its sources; prints where it is, or why there is none."""
    try:
        print(build_library())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
