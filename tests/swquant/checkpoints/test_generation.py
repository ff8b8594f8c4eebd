"""generation_config.json: what transformers would stumble over is said when the file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import PROMPT

import swquant
from exporters.errors import CheckpointError
from swquant.checkpoints.generation import read_generation


def write(folder: Path, **settings: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": [1, 2], "pad_token_id": None, "temperature": 1, "do_sample": True, "unknown": {"a": 1}},
        {"pad_token_id": -1, "top_k": 50, "top_p": 0.9, "suppress_tokens": [1], "transformers_version": "5.23.0"},
        {"eos_token_id": 5, "max_length": 20, "cache_implementation": "hybrid", "stop_strings": ["x"]},
    ],
)
def test_what_models_have_is_taken(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert read_generation(write(tmp_path, **settings)) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_token_id": " "}, "pad_token_id is ' ', not an id"),
        ({"bos_token_id": 2**64}, "bos_token_id is 18446744073709551616, not an id"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id is \[1, '2'\], not an id or a list of ids"),
        ({"output_hidden_states": "-1"}, "output_hidden_states is '-1', not true or false"),
        ({"use_cache": 7}, "use_cache is 7, not true or false"),
        ({"top_k": 0.5}, "top_k is 0.5, not a whole number"),
        ({"temperature": "\x1b[31m"}, r"temperature is '\\x1b\[31m', not a number"),
        ({"temperature": float("nan")}, "temperature is nan, not a number"),
        ({"early_stopping": "perhaps"}, "not usable .*early_stopping"),
        ({"cache_implementation": "none such"}, "not usable .*cache_implementation"),
        ({"validate": 1}, "not usable"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}.*; correct it") as caught:
        read_generation(write(tmp_path, **settings))
    assert "\n" not in str(caught.value)


def test_a_compressed_copy_does_not_carry_it_on(source: Path, tmp_path: Path) -> None:
    write(source, output_hidden_states="-1")
    for ask in (
        lambda: swquant.compress(source, tmp_path / "out", prompt=PROMPT),
        lambda: swquant.load(source),
        lambda: swquant.generate(source, PROMPT, tokens=2),
    ):
        with pytest.raises(swquant.SwquantError, match="output_hidden_states"):
            ask()
    assert not (tmp_path / "out").exists()


def test_settings_that_fail_only_when_they_are_used_are_one_message(source: Path) -> None:
    write(source, repetition_penalty=-1.0)
    with pytest.raises(swquant.SwquantError, match=r"repetition_penalty|penalty.*; correct generation_config\.json"):
        swquant.generate(source, PROMPT, tokens=2)
