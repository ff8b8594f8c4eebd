"""Text to token ids: what a tokenizer does wrong is one message, whichever verb asks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import PROMPT, sample_text
from transformers import AutoTokenizer

import swquant
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.tokenizer import encode

VERBS: dict[str, Callable[[Path, str], object]] = {
    "detect": lambda folder, text: swquant.detect(folder, text),
    "generate": lambda folder, text: swquant.generate(folder, text, tokens=2),
    "evaluate": lambda folder, text: swquant.evaluate(folder, text),
}


class PanicException(BaseException):
    """As pyo3 has it: not an Exception."""


def failing(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    """Every tokenizer raises or returns `result`."""

    def call(*_: object, **__: object) -> dict[str, Any]:
        if isinstance(result, BaseException):
            raise result
        return {"input_ids": result}

    original = ModelFolder.tokenizer

    def tokenizer(folder: ModelFolder) -> object:
        found = original(folder)
        monkeypatch.setattr(type(found), "__call__", call)
        return found

    monkeypatch.setattr(ModelFolder, "tokenizer", tokenizer)


@pytest.mark.parametrize("verb", VERBS)
def test_a_token_that_the_embedding_lacks_is_named(source: Path, verb: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    message = r"the tokenizer produced token 128 \(<extra>\), the model knows 0 to 127; leave it out of the text"
    with pytest.raises(swquant.SwquantError, match=message):
        VERBS[verb](source, "t5 t9 <extra> t17")
    VERBS[verb](source, "t5 t9 t17")


@pytest.mark.parametrize("verb", VERBS)
def test_a_panic_of_the_library_is_one_message(source: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    failing(monkeypatch, PanicException("index out of bounds: the len is 3\nnote: run with RUST_BACKTRACE=1"))
    with pytest.raises(
        swquant.SwquantError, match=r"cannot read this text \(index out of bounds.*\); put the"
    ) as caught:
        VERBS[verb](source, PROMPT)
    assert "\n" not in str(caught.value)


def test_a_panic_while_loading_is_one_message(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object, **__: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(swquant.SwquantError, match="no usable tokenizer .called .*; put tokenizer.json beside"):
        swquant.detect(source, PROMPT)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_ctrl_c_is_no_failure_of_the_tokenizer(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        swquant.generate(source, PROMPT)


@pytest.mark.parametrize("ids", [[5, -1], [5, None], [5, 2**40]])
def test_what_is_no_id_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch, ids: list[Any]) -> None:
    failing(monkeypatch, ids)
    with open_checkpoint(source) as checkpoint, pytest.raises(swquant.SwquantError, match=f"produced token {ids[1]}"):
        encode(checkpoint, PROMPT)


@pytest.mark.parametrize("verb", VERBS)
def test_text_that_is_not_unicode_is_one_message(source: Path, verb: str) -> None:
    with pytest.raises(swquant.SwquantError, match="cannot read this text|too few|is empty|has 0 tokens"):
        VERBS[verb](source, "\udcff")


@pytest.mark.parametrize("verb", VERBS)
def test_a_tokenizer_of_ids_alone_is_enough(source: Path, verb: str) -> None:
    """Custom ones, those of Mamba and RWKV: `model_input_names` without attention_mask."""
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids"]}))
    VERBS[verb](source, PROMPT)


@pytest.mark.parametrize(
    ("words", "tokens", "fits"), [(126, 2, True), (127, 1, True), (127, 2, False), (128, 1, False), (500, 4, False)]
)
def test_generate_asks_for_no_more_than_the_model_takes(source: Path, words: int, tokens: int, fits: bool) -> None:
    text = sample_text(words)
    if fits:
        assert len(swquant.generate(source, text, tokens=tokens).split()) >= words
    else:
        message = f"a prompt of {words} tokens and {tokens} to generate are more than the 128 .*; shorten the prompt"
        with pytest.raises(swquant.SwquantError, match=message):
            swquant.generate(source, text, tokens=tokens)


def test_what_the_library_prints_does_not_reach_standard_output(
    source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It names a key that it does not know on standard output, in the file's own words."""
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0]["\x1b[31mkey"] = True
    path.write_text(json.dumps(tokenizer))
    AutoTokenizer.from_pretrained(source)
    assert "unknown kwarg" in capfd.readouterr().out
    with open_checkpoint(source) as checkpoint:
        checkpoint.tokenizer()
    assert capfd.readouterr().out == ""
    print("still there")
    assert capfd.readouterr().out == "still there\n"
