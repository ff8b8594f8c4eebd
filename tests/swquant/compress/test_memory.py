"""`compress --low-memory` stays within 1 GiB plus three times the largest tensor, the probe included; with `best` three
times the largest layer, and what its texts hold.

Held with models of about a gigabyte in which no tensor is large. `benchmarks/memory.py` makes them, larger ones too,
and says how it measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import PROJECT
from transformers import LlamaConfig, Qwen3MoeConfig

BENCHMARK = PROJECT / "benchmarks" / "memory.py"
SIZES = {"vocab_size": 4096, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "eos_token_id": 1}
# Name -> (layers, configuration, what is held to the bound).
MODELS = {
    "llama": (
        40,
        LlamaConfig(intermediate_size=2816, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SIZES),
        "peak",
    ),
    "mixture": (  # in one tensor, as transformers holds them, a layer's experts would be 1 GB
        2,
        Qwen3MoeConfig(
            intermediate_size=1024,
            moe_intermediate_size=640,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16",
            **SIZES,
        ),
        "private",
    ),
}


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_memory", BENCHMARK)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much was resident")
@pytest.mark.parametrize(("name", "row"), [*((name, "plain rounding") for name in MODELS), ("llama", "best")])
def test_the_bound_holds(name: str, row: str, tmp_path: Path) -> None:
    layers, config, held = MODELS[name]
    memory = benchmark()
    memory.MODELS[name] = (layers, config)
    model = tmp_path / "model"
    model.mkdir()
    memory.make_model(name, model, layers)
    sizes = [memory.size(shape) for shape in memory.tensors(name, layers).values()]
    command = [sys.executable, BENCHMARK, "--measure", row, model, tmp_path / "out"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    bound = memory.bounds(name, layers, memory.TEXTS)[row]
    print(row, {key: round(value / 1e6) for key, value in measured.items()}, "bound", round(bound / 1e6))
    assert measured["imports"] + sum(sizes) > 1.1 * bound  # it would not hold if all of it were resident
    assert measured[held] <= bound
