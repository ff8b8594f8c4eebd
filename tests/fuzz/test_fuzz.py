"""Damaged files: no traceback, no signal, no hang, no flood of memory, and nothing accepted that is not so.

The slow test is long, so it ends after SWQUANT_FUZZ_SECONDS (600) and says how far it came; SWQUANT_FUZZ_FIRST=N goes
on from there, SWQUANT_FUZZ=N asks for another number than 1,500, SWQUANT_FUZZ_SEED=N for other mutants.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from fuzz.gguf_mutations import damaged_gguf, fields
from fuzz.json_mutations import damaged_json
from fuzz.safetensors_mutations import damaged_safetensors, joined, split
from support.paths import PROJECT
from support.tiny_gguf import write_gguf


def fuzz(folder: Path, *words: object) -> str:
    """What a run printed; it must end well."""
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT / 'tests'}{os.pathsep}{PROJECT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz.run", "--work", folder, *words]
    ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    return ran.stdout


def test_two_mutants_of_every_kind(tmp_path: Path) -> None:
    assert "20 mutants" in fuzz(tmp_path, "--count", 20)


@pytest.mark.slow
def test_many_mutants(tmp_path: Path) -> None:
    first = int(os.environ.get("SWQUANT_FUZZ_FIRST", "0"))
    count = int(os.environ.get("SWQUANT_FUZZ", "1500"))
    seconds = float(os.environ.get("SWQUANT_FUZZ_SECONDS", "600"))
    seed = int(os.environ.get("SWQUANT_FUZZ_SEED", "0"))
    told = fuzz(tmp_path, "--seed", seed, "--first", first, "--count", count - first, "--seconds", seconds)
    print(told)
    following = int(re.search(r"next --first (\d+)", told)[1])  # type: ignore[index]
    if following < count:
        pytest.skip(f"{following} of {count} mutants in {seconds:.0f} s, all well; SWQUANT_FUZZ_FIRST={following}")


def test_a_mutant_is_the_same_every_time_and_another_one_is_not(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    gguf, document = (tmp_path / "model.gguf").read_bytes(), b'{"a": [1, {"b": "c"}], "d": 0.5}'
    tensors = joined({"x.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}, bytes(8))
    for damaged, data in ((damaged_gguf, gguf), (damaged_json, document), (damaged_safetensors, tensors)):
        once, again = ([damaged(Random(seed), data) for seed in range(300)] for _ in range(2))
        assert once == again
        assert len({result for result, _ in once}) > 100
        assert sum(result == data for result, _ in once) < 50


def test_the_parser_of_gguf_finds_every_field(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    found = [field for field in fields(data) if field.form != "s"]
    assert {"version", "tensors", "llama.block_count", "offset of blk.0.attn_q.weight"} <= {
        field.name for field in found
    }
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))


def test_a_file_is_split_and_joined_to_itself() -> None:
    header, body = {"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc"
    assert split(joined(header, body)) == (header, body)
