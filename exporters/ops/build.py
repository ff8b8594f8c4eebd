"""Compiles the operator library with the system's C++ compiler: `python -m exporters.ops.build`.

Installing swquant does the same (tools/build_operators.py). One command compiles everything; the instruction sets are
chosen by attributes inside the sources, so no file needs flags of its own and one library serves every x86-64 CPU. With
CUDA (SWQUANT_CUDA=on, or a device and nvcc) two more commands compile and link its kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from exporters.ops import LIBRARY

__all__ = ["BuildError", "build_library", "find_compiler", "find_nvcc", "sources"]

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")


class BuildError(Exception):
    """There is no compiler, or it failed; the message holds what it said."""


def sources() -> list[Path]:
    """The C++ files of the library without CUDA."""
    return sorted(FOLDER.glob("*.cc")) + sorted((FOLDER / "cpu").glob("*.cc"))


def find_compiler() -> str | None:
    """$CXX, or the first of c++, g++ and clang++ that is installed."""
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """The CUDA compiler of the system, or of NVIDIA's Python packages."""
    packaged = (Path(folder) / "nvidia" for folder in sys.path if folder)
    candidates = (
        nvcc for folder in packaged for nvcc in (*folder.glob("cu*/bin/nvcc"), *folder.glob("cuda_nvcc/bin/nvcc"))
    )
    return shutil.which("nvcc") or next((str(path) for path in candidates), None)


def wants_cuda() -> bool:
    """SWQUANT_CUDA=on or off; by itself where there is a device to use it."""
    choice = os.environ.get("SWQUANT_CUDA", "auto")
    if choice not in ("on", "off", "auto"):
        raise BuildError(f"SWQUANT_CUDA is {choice!r}; known are on, off and auto")
    return choice == "on" or (choice == "auto" and Path("/dev/nvidiactl").exists() and find_nvcc() is not None)


def architectures(nvcc: str) -> list[str]:
    """-gencode options: one binary per generation that this nvcc knows from Turing on, and PTX for those to come.

    A binary for sm_80 runs on sm_86 and sm_89 too, so one of each major number is enough.
    """
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    known = sorted(int(name) for name in re.findall(r"^sm_(\d+)$", listed, re.MULTILINE) if int(name) >= 75)
    if not known:
        raise BuildError(f"{nvcc} lists no architecture from sm_75 on")
    first = {number // 10: number for number in reversed(known)}.values()
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in sorted(first)]
    return [*options, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def run(command: Sequence[str | Path], folder: Path | None = None) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr.strip()}")


def build_library(target: Path = FOLDER / LIBRARY, flags: Sequence[str] = (), *, emulate_cuda: bool = False) -> Path:
    """Compiles the library to `target`, which appears when it is whole. `flags` come after the usual ones.

    emulate_cuda: the CUDA operator takes the place of the CPU's, its kernels run in the emulator; for tests.
    Raises BuildError without a compiler, on a system other than Linux, and where a compiler does not succeed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or clang++, or name one in CXX")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the operator library is built on Linux only, not on {sys.platform}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as name:
        folder = Path(name)
        whole = folder / target.name
        everything: list[str | Path] = [compiler, *FLAGS, *flags, *sources()]
        if emulate_cuda:
            cuda: list[str | Path] = [
                "-DSWQUANT_EMULATION",
                FOLDER / "cuda" / "linear.cc",
                FOLDER / "cuda" / "standalone.cc",
            ]
            run([*everything, *cuda, "-shared", "-o", whole])
        elif wants_cuda():
            run([*everything, "-DSWQUANT_CUDA", "-c"], folder)
            link_with_cuda(compiler, folder, whole)
        else:
            run([*everything, "-shared", "-o", whole])
        whole.replace(target)
    return target


def link_with_cuda(compiler: str, folder: Path, whole: Path) -> None:
    """nvcc compiles the kernels and their host side, and links them with the objects in `folder` and a CUDA runtime of
    their own, so that the library also loads where there is no CUDA."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("SWQUANT_CUDA is on and there is no nvcc; install CUDA's or pip install nvidia-cuda-nvcc")
    common = [nvcc, "-ccbin", compiler, "-cudart", "static"]
    options = ["-std=c++17", "-O3", "--fmad=false", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    objects = folder / "cuda"
    objects.mkdir()
    files = [FOLDER / "cuda" / "kernels.cu", FOLDER / "cuda" / "linear.cc"]
    run([*common, *options, *architectures(nvcc), "-c", *files], objects)
    parts = [*sorted(folder.glob("*.o")), *sorted(objects.glob("*.o"))]
    run([*common, "-shared", "-Xlinker", "--exclude-libs=ALL", *parts, "-o", whole])


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
