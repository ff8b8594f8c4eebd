"""Asks stock transformers about checkpoints: run by the Python of vLLM's environment, which has no swquant.

Reads {folder: [[token, …], …]} as JSON on stdin, writes {folder: [[log-probability of each token but the first], …]} to
the file that its argument names. Computes in float32: what differs then is the other's rounding.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logprobs(folder: str, texts: list[list[int]]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = []
    for text in texts:
        tokens = torch.tensor(text)
        predicted = model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(dim=-1)
        result.append(predicted.gather(1, tokens[1:].unsqueeze(1)).squeeze(1).tolist())
    return result


if __name__ == "__main__":
    answers = {folder: logprobs(folder, texts) for folder, texts in json.load(sys.stdin).items()}
    Path(sys.argv[1]).write_text(json.dumps(answers))
