"""llama.cpp runs what is written: the same tokens, and the same probabilities but for its own rounding of inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from llama.environment import ask_llama, needs_llama
from support.gguf_models import MODELS, PROMPT, save_gguf_model
from torch import Tensor

import swquant
from swquant.checkpoints.open import open_checkpoint

IDS = [5, 77, 120, 9, 300, 41, 222, 17, 63, 190, 11, 12]
TEXTS = [
    "The capital of France is Paris, and the capital of Germany is",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n    return",
]


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Of each token after the first."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return logs[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_models(name: str, tmp_path: Path) -> None:
    model = save_gguf_model(name, tmp_path / "model")
    written = swquant.compress(
        tmp_path / "model", tmp_path / "out.gguf", format="gguf", type="Q8_0", preset="fast", prompt=PROMPT
    )
    (answer,) = ask_llama(written.path, ids=[IDS])
    assert float((torch.tensor(answer["logs"]) - log_probabilities(model, IDS)).abs().max()) < 0.3


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0"])
def test_a_real_model_speaks(kind: str, tmp_path: Path) -> None:
    """SmolLM2: llama.cpp's tokens are ours, its probabilities near those of the weights in the file."""
    source = os.environ.get("SWQUANT_SMOLLM2")
    if not source:
        pytest.skip("needs SWQUANT_SMOLLM2, as make test-llama sets it")
    written = swquant.compress(source, tmp_path / "out.gguf", format="gguf", type=kind)
    model = swquant.load(written.path, dtype=torch.float32)
    with open_checkpoint(written.path) as opened:
        tokenizer = opened.tokenizer()
    for text, answer in zip(TEXTS, ask_llama(written.path, texts=TEXTS, tokens=8), strict=True):
        assert answer["ids"] == tokenizer(text)["input_ids"]
        difference = (torch.tensor(answer["logs"]) - log_probabilities(model, answer["ids"])).abs()
        assert float(difference.mean()) < 0.15
        with torch.no_grad():
            greedy = model.generate(torch.tensor([answer["ids"]]), max_new_tokens=8, do_sample=False)
        assert answer["greedy"][0] == greedy[0, len(answer["ids"])]
