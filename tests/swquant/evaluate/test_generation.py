"""`generate` and `load` ask a model as its generation_config.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT
from transformers import AutoModelForCausalLM

import swquant

IDS = [5, 9, 17, 33, 64]
TEXT = " ".join(f"t{token}" for token in IDS)


@pytest.fixture
def continued(source: Path) -> list[int]:
    """What the model says after TEXT, with nothing to end it."""
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stock.generation_config.eos_token_id = None
    return stock.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS) :].tolist()


def settings(folder: Path, **values: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_a_list_of_end_tokens_ends_the_text(source: Path, continued: list[int], tmp_path: Path) -> None:
    stop = continued[3]
    settings(source, eos_token_id=[1, stop], bos_token_id=0, pad_token_id=1)
    assert swquant.load(source).generation_config.eos_token_id == [1, stop]
    expected = len(IDS) + continued.index(stop) + 1
    assert len(swquant.generate(source, TEXT, tokens=12).split()) <= expected
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT).path
    assert swquant.load(out).generation_config.eos_token_id == [1, stop]


def test_it_stays_greedy_and_one_text(source: Path, continued: list[int]) -> None:
    expected = swquant.generate(source, TEXT, tokens=3)
    settings(
        source, do_sample=True, temperature=5.0, top_k=50, num_beams=4, num_return_sequences=3, max_length=2,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert swquant.generate(source, TEXT, tokens=3) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": '])
def test_damaged_settings_are_one_message_where_they_are_asked_for(source: Path, content: str) -> None:
    (source / "generation_config.json").write_text(content)
    for ask in (lambda: swquant.generate(source, TEXT), lambda: swquant.load(source)):
        with pytest.raises(swquant.SwquantError, match=r"generation_config\.json: not (JSON|a JSON object)"):
            ask()
    swquant.detect(source, PROMPT)
