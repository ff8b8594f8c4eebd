"""Text to train on: windows, conversations with their responses marked, and files that are refused by line."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import Planted, sample_text

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.training.data import Corpus, conversations, text_windows, token_windows

TEMPLATE = "{% for m in messages %}t9{{ ' ' }}{{ m['content'] }}{{ ' t1 ' }}{% endfor %}{% if add_generation_prompt %}t9 {% endif %}"


@pytest.fixture
def model(bf16_llama: Planted) -> Checkpoint:
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        return checkpoint


@pytest.fixture
def chat(source: Path) -> Checkpoint:
    """The same with a chat template."""
    (source / "chat_template.jinja").write_text(TEMPLATE)
    with open_checkpoint(source) as checkpoint:
        return checkpoint


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_text_is_cut_into_windows_all_of_which_counts(model: Checkpoint) -> None:
    corpus = text_windows(model, sample_text(50), 16)
    assert [len(ids) for ids, _ in corpus.sequences] == [16, 16, 16]
    assert all(bool(counted.all()) for _, counted in corpus.sequences)
    assert corpus.sequences[0][0].tolist() == [int(word[1:]) for word in sample_text(16).split()]
    batch = corpus.batch([0, 2])
    assert batch.ids.shape == (2, 16)
    assert batch.tokens == 2 * 15


@pytest.mark.parametrize(("words", "window"), [(31, 16), (0, 16), (50, 1), (500, 129)])
def test_a_text_too_short_or_a_window_that_cannot_be_is_refused(model: Checkpoint, words: int, window: int) -> None:
    with pytest.raises(SwquantError, match=r"less than two windows of 16|--window (1|129) is outside 2 to 128"):
        text_windows(model, sample_text(words), window)


def test_the_last_windows_are_held_out() -> None:
    corpus = token_windows(torch.arange(40).view(20, 2), "x")
    train, held = corpus.split()
    assert (len(train), len(held)) == (18, 2)
    assert held.sequences[1][0].tolist() == [38, 39]
    with pytest.raises(SwquantError, match="x: 1 window of text; 2 are the least"):
        token_windows(torch.arange(2).view(1, 2), "x").split()


def test_every_sequence_is_seen_once_before_any_is_seen_again() -> None:
    corpus = token_windows(torch.arange(14).view(7, 2), "x")
    drawn = [corpus.drawn(number, 2, seed=3).ids[:, 0].tolist() for number in range(7)]
    seen = [first // 2 for batch in drawn for first in batch]
    assert sorted(seen[:7]) == sorted(seen[7:]) == [*range(7)]
    assert seen[:7] != seen[7:]
    assert drawn == [corpus.drawn(number, 2, seed=3).ids[:, 0].tolist() for number in range(7)]
    assert drawn != [corpus.drawn(number, 2, seed=4).ids[:, 0].tolist() for number in range(7)]


def test_of_prompt_and_response_the_response_counts(model: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "t2 t3", "response": "t4 t5 "}, "", {"prompt": "", "response": "t6 "})
    corpus = conversations(model, path, 16)
    (ids, counted), (other, all_of_it) = corpus.sequences
    assert ids.tolist() == [2, 3, 4, 5, 1]
    assert counted.tolist() == [False, False, True, True, True]
    assert (other.tolist(), all_of_it.tolist()) == ([6, 1], [True, True])
    batch = corpus.batch([0, 1])
    assert batch.ids.tolist() == [[2, 3, 4, 5, 1], [6, 1, 1, 1, 1]]
    assert batch.counted.tolist() == [[False, True, True, True], [True, False, False, False]]


def test_of_messages_what_the_template_makes_of_responses_counts(chat: Checkpoint, tmp_path: Path) -> None:
    messages = [("user", "t2"), ("assistant", "t3 t4"), ("user", "t5"), ("assistant", "t6")]
    talk = {"messages": [{"role": role, "content": text} for role, text in messages]}
    ids, counted = conversations(chat, write(tmp_path / "x.jsonl", talk, talk), 32).sequences[1]
    assert ids.tolist() == [9, 2, 1, 9, 3, 4, 1, 9, 5, 1, 9, 6, 1]
    assert [token for token, counts in zip(ids.tolist(), counted.tolist(), strict=True) if counts] == [3, 4, 1, 6, 1]


GOOD = {"prompt": "t2", "response": "t3"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("5", "line 2 is no object"),
        ({"prompt": "t2"}, "line 2: needs"),
        ({"prompt": "t2", "response": 5}, "line 2: needs"),
        ({"prompt": "t2", "response": ""}, "line 2 does not end with a response"),
        ({"messages": []}, "line 2 does not end with a response"),
        ({"messages": "t2"}, "line 2: needs"),
        ({"messages": [{"role": "robot", "content": "t2"}]}, "line 2: needs"),
        ({"messages": [{"role": "user", "content": "t2"}]}, "line 2 does not end with a response"),
        (
            {"messages": [{"role": "assistant", "content": "t2"}]},
            "line 2 has messages, and the tokenizer no chat template",
        ),
        ({"prompt": " ".join(["t2"] * 20), "response": "t3"}, "line 2 has no response within 16 tokens"),
    ],
)
def test_a_broken_line_is_named(model: Checkpoint, tmp_path: Path, line: object, problem: str) -> None:
    path = write(tmp_path / "x.jsonl", GOOD, line, GOOD)
    with pytest.raises(SwquantError, match=rf"x.jsonl: {problem}") as caught:
        conversations(model, path, 16)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, problem in (
        (tmp_path / "missing", "cannot be read"),
        (tmp_path / "bytes", "not UTF-8 text"),
        (write(tmp_path / "one", GOOD), "1 conversations are too few"),
    ):
        with pytest.raises(SwquantError, match=problem):
            conversations(model, path, 16)


def test_batches_go_through_all_of_it() -> None:
    corpus = Corpus("x", token_windows(torch.arange(10).view(5, 2), "x").sequences)
    assert [len(batch.ids) for batch in corpus.batches(2)] == [2, 2, 1]
