"""Asks vLLM about checkpoints: a program of its own, run by the Python of vLLM's environment, which has no swquant.

Reads {"folders": […], "prompts": [[token, …], …], "tokens": n, "top": k, "ranks": r} as JSON on stdin; the last two may
be missing. Writes to the file that its argument names a line {"folder": …, "answer": …} for each: of every prompt
{"tokens": those of the prompt and n greedy ones, "logprobs": of all but the first, "top": for each token of the prompt
but the first the k likeliest ones as [[token, …], [log-probability, …]]}, or {"refusal": the words that vLLM stops
with}. r processes share the weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# In this process, so that a refusal is an exception and not the last lines of another process's log.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams

LENGTH = 128


def answer(folder: str, prompts: list[list[int]], tokens: int, top: int = 0, ranks: int = 1) -> Any:
    greedy = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=top
    )
    try:
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=LENGTH,
            max_num_seqs=len(prompts),
            max_logprobs=max(top, 1),
            tensor_parallel_size=ranks,
        )
        said = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    except Exception as error:  # of whatever class vLLM refuses a checkpoint with
        return {"refusal": f"{type(error).__name__}: {error}"}
    return [told(request) for request in said]


def told(request: Any) -> dict[str, Any]:
    written = request.outputs[0]
    ids = [*request.prompt_token_ids, *written.token_ids]
    seen = [*request.prompt_logprobs, *written.logprobs]  # the first token has none
    return {
        "tokens": ids,
        "logprobs": [table[token].logprob for token, table in zip(ids[1:], seen[1:], strict=True)],
        "top": [[list(table), [found.logprob for found in table.values()]] for table in request.prompt_logprobs[1:]],
    }


def main() -> None:
    """vLLM is imported once, and every folder answered by a fork, so that no engine sees what another one left."""
    asked = json.load(sys.stdin)
    folders = asked.pop("folders")
    with tempfile.TemporaryDirectory() as scratch, Path(sys.argv[1]).open("w") as lines:
        for number, folder in enumerate(folders):
            path = Path(scratch, str(number))
            child = os.fork()
            if not child:
                path.write_text(json.dumps(answer(**asked, folder=folder)))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            died = {"refusal": f"died: {os.waitstatus_to_exitcode(status)}"}
            said = json.loads(path.read_text()) if path.is_file() else died
            print(json.dumps({"folder": folder, "answer": said}), file=lines, flush=True)


if __name__ == "__main__":
    main()
