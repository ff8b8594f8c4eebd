"""`generate`: streamed, ended where the settings say, in the model's chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, Planted
from transformers import AutoTokenizer

import swquant
from exporters.errors import SwquantError
from swquant.evaluate.writing import _Pieces

START = "t5 t9 t33 t64"
TEMPLATE = "{% for m in messages %}t5 {{ m.content }} t7{% endfor %}{% if add_generation_prompt %} t9{% endif %}"


@pytest.fixture
def folder(bf16_llama: Planted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bf16_llama.folder, tmp_path / "model"))


def test_pieces_add_up(folder: Path) -> None:
    pieces: list[str] = []
    whole = swquant.generate(folder, PROMPT, tokens=12, on_text=pieces.append)
    assert "".join(pieces) == whole == swquant.generate(folder, PROMPT, tokens=12)
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        (["a", "a b", "a b c"], ["a b", " c"]),  # the first is the prompt
        (["a", "a \ufffd", "a ä", "a äb"], ["a", " ä", "b"]),  # half of a character
        (["a", "a ,", "a, b", "a, b"], ["a ,"]),  # a tokenizer that joins what it has said: the rest comes at the end
        (["a", "a ", "a, b"], ["a", ", b"]),
    ],
    ids=str,
)
def test_what_may_still_change_waits(texts: list[str], pieces: list[str]) -> None:
    given: list[str] = []
    stream = _Pieces(lambda ids: texts[len(ids) - 1], 0, given.append)
    for number in range(len(texts)):
        stream.put(torch.tensor([number]))
    assert given == pieces
    stream.end()
    assert len("".join(given)) == len(texts[-1])


def test_it_ends_where_generation_config_says(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(swquant.generate(folder, START, tokens=12))["input_ids"]
    prompt = len(tokenizer(START)["input_ids"])
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token_id": [1, ids[prompt + 3]]}))
    out = tokenizer(swquant.generate(folder, START, tokens=12))["input_ids"]
    assert out == ids[: ids.index(ids[prompt + 3], prompt) + 1]


def test_a_chat_is_asked_in_the_models_template(cli: Cli, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    whole = swquant.generate(folder, "t5 t21 t33 t7 t9", tokens=6)
    answer = swquant.generate(folder, "t21 t33", tokens=6, chat=True)
    assert whole == f"t5 t21 t33 t7 t9 {answer}"
    assert cli("generate", folder, "t21 t33", "--chat", "--tokens", "6").out == f"{answer}\n"
    assert document(cli("generate", folder, "t21 t33", "--chat", "--tokens", "6", "--json"))["text"] == answer


def test_a_chat_needs_a_template(cli: Cli, folder: Path) -> None:
    line = one_line(cli("generate", folder, "t5", "--chat"))
    assert line == f"error: {folder.name}: its tokenizer has no chat template; leave out --chat"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only twice') }}")
    with pytest.raises(SwquantError, match=r"its chat template does not take this \(only twice\); leave out --chat"):
        swquant.generate(folder, "t5", chat=True)


def test_a_setting_that_fails_leaves_no_half_answer(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *_: object, **how: Any) -> None:
        how["streamer"].put(torch.tensor([[5, 9]]))
        raise ValueError("no such setting")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", fail)
    assert "transformers cannot write with these settings (no such setting)" in one_line(cli("generate", folder, "t5"))
