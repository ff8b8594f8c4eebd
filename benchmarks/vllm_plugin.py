"""What swquant-vllm costs in vLLM: tokens per second with and without it, on the CPU.

    python benchmarks/vllm_plugin.py CHECKPOINT            (after `make test-vllm`, which makes the environment)

Decoding, one text at a time: `--tokens` of them, less what a single token takes, which is reading the prompt and
vLLM's own work around it. Reading, the same way: a prompt of `--prompt` tokens. Each run is a process of its own, with
the plugin and without it in turn, `--rounds` times; the best of each counts, since on a machine with something else to
do seconds only grow. `--compiled` lets vLLM compile the model first. `--json FILE` keeps all numbers.

The same file is the program that vLLM's Python runs (`--measure`): it imports nothing of swquant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def measure(folder: str, tokens: int, prompt: int, compiled: bool) -> dict[str, float]:
    """Tokens per second, in the process that has vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=prompt + tokens,
        max_num_batched_tokens=prompt + tokens,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )

    def seconds(length: int, written: int) -> float:
        asked = SamplingParams(temperature=0, max_tokens=written, ignore_eos=True, detokenize=False)
        best = float("inf")
        for _ in range(3):
            begun = time.perf_counter()
            llm.generate([{"prompt_token_ids": list(range(5, 5 + length))}], asked, use_tqdm=False)
            best = min(best, time.perf_counter() - begun)
        return best

    one = seconds(8, 1)
    return {
        "decode": (tokens - 1) / (seconds(8, tokens) - one),
        "read": (prompt - 8) / max(seconds(prompt, 1) - one, 1e-9),
    }


def run(arguments: argparse.Namespace, plugin: bool) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | SWITCHES
    if plugin:
        environment["PYTHONPATH"] = str(HERE / ".venv-plugin")
    words = [str(arguments.checkpoint.resolve()), "--measure"]
    words += ["--tokens", str(arguments.tokens), "--prompt", str(arguments.prompt)]
    words += ["--compiled"] * arguments.compiled
    ran = subprocess.run(
        [HERE / ".venv-vllm/bin/python", __file__, *words], env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        found = measure(str(arguments.checkpoint), arguments.tokens, arguments.prompt, arguments.compiled)
        print(json.dumps(found), flush=True)
        os._exit(0)  # an engine takes its time to go
    from machine import describe

    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(arguments.rounds):
        for name, found in runs.items():
            found.append(run(arguments, name == "with"))
            print(f"{name}: {found[-1]}", file=sys.stderr, flush=True)
    best = {name: {key: max(each[key] for each in found) for key in found[0]} for name, found in runs.items()}
    for key in ("decode", "read"):
        without, with_ = best["without"][key], best["with"][key]
        print(f"{key:6}  {without:8.1f} tokens/s without, {with_:8.1f} with: {1 - with_ / without:+.1%} slower")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "best": best, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
