from __future__ import annotations

import platform
from pathlib import Path

import pytest
from support.linear_nbits import cpu_flags

from exporters.ops import LIBRARY, library_path
from exporters.ops.build import FOLDER, build_library, find_compiler, sources

SIMDE = Path("/usr/include/simde/x86/avx512.h")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed library, or one made of the sources as they are now."""
    installed = library_path()
    newest = max(path.stat().st_mtime for path in (*sources(), *FOLDER.rglob("*.h")))
    if installed is not None and installed.stat().st_mtime >= newest:
        return installed
    if find_compiler() is None:
        pytest.skip("no operator library and no C++ compiler")
    return build_library(tmp_path_factory.mktemp("library") / LIBRARY, ["-O1"])


@pytest.fixture(scope="session")
def emulated_avx512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AVX-512 source on a CPU without it: SIMDe (Debian's libsimde-dev) does what each intrinsic says."""
    if not SIMDE.exists() or platform.machine() != "x86_64" or "avx2" not in cpu_flags() or find_compiler() is None:
        pytest.skip("needs an x86-64 CPU with AVX2, a C++ compiler and SIMDe (apt install libsimde-dev)")
    flags = ["-O1", "-DSWQUANT_SIMDE", "-mavx2", "-mfma", "-Wno-psabi"]
    return build_library(tmp_path_factory.mktemp("emulated") / LIBRARY, flags)
