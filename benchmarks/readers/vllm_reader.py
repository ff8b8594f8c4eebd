"""vLLM, run by the Python of its environment; with swquant-vllm where PYTHONPATH leads there. See `deployments.py`.

Logits of a prompt are what its processor of logits computes when it is asked for log-probabilities of the prompt; the
last token's come with the first greedy token.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from timing import report
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.logits_processor import LogitsProcessor

asked = json.load(sys.stdin)
kept: list[torch.Tensor] = []
forward = LogitsProcessor.forward


def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
    logits = forward(self, *args, **kwargs)
    kept.append(logits.float().clone())
    return logits


LogitsProcessor.forward = keeping
window = max(len(ids) for ids in asked["windows"])
llm = LLM(
    asked["file"],
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=window + 1 + asked["tokens"],
    max_num_seqs=1,
    enable_prefix_caching=False,
)


def ask(ids: list[int], count: int, **how: Any) -> list[int]:
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **how)
    return list(llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)[0].outputs[0].token_ids)


with Path(asked["out"]).open("wb") as file:
    for ids in asked["windows"]:
        kept.clear()
        ask(ids, 1, prompt_logprobs=0)
        prompt, last = sorted(kept, key=len, reverse=True)[:2]
        file.write(torch.cat([prompt[: len(ids) - 1], last[-1:]]).numpy().tobytes())


def written(count: int) -> list[int]:
    kept.clear()
    return ask(asked["prompt"], count)


report(written, asked["tokens"])
