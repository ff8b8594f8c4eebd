"""Vocabularies: of byte-level tokenizers, of SentencePiece's kind, and those that GGUF cannot hold."""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from support.gguf_models import save_byte_level, save_sentencepiece
from support.tiny_models import save_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporters.errors import SwquantError
from swquant.export.gguf.vocabulary import KNOWN, PROBE, Vocabulary, add_vocabulary, vocabulary_of

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def of(folder: Path, size: int = 384) -> Vocabulary:
    return vocabulary_of("model", AutoTokenizer.from_pretrained(folder), size)


def split_by(*steps: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level(tmp_path: Path) -> None:
    save_byte_level(tmp_path)
    vocabulary, tokenizer = of(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (vocabulary.model, vocabulary.split, vocabulary.scores) == ("gpt2", "gpt-2", None)
    assert len(vocabulary.tokens) == len(vocabulary.kinds) == 384
    for token, number in tokenizer.get_vocab().items():
        assert vocabulary.tokens[number] == token
        assert vocabulary.kinds[number] == (gguf.TokenType.CONTROL if number < 3 else gguf.TokenType.NORMAL)
    assert vocabulary.tokens[-1] == "[PAD383]"
    assert vocabulary.kinds[-1] == gguf.TokenType.UNUSED
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, vocabulary, tmp_path)
    keys = {name: value.value for name, value in writer.kv_data[0].items()}
    assert keys["tokenizer.ggml.merges"][0] == "a h"
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert "messages" in keys["tokenizer.chat_template"]
    assert "tokenizer.ggml.scores" not in keys


def test_sentencepiece(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    vocabulary, tokenizer = of(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (vocabulary.model, vocabulary.split, vocabulary.space_prefix) == ("llama", "default", True)
    assert vocabulary.scores is not None
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    kinds = {
        token: gguf.TokenType(vocabulary.kinds[ids[token]]).name
        for token in ("<unk>", "<s>", "<0x41>", "ab", "[PAD383]")
    }
    assert kinds == {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x41>": "BYTE", "ab": "NORMAL", "[PAD383]": "UNUSED"}
    assert vocabulary.scores[ids["ab"]] > vocabulary.scores[ids["cd"]] > vocabulary.scores[ids["abcd"]]
    for text in ("abcd", "cab ab", "dabcd", "bad cab", "abx"):
        assert [ids[piece] for piece in merged_by_score(text, vocabulary)] == tokenizer.encode(text)


def merged_by_score(text: str, vocabulary: Vocabulary) -> list[str]:
    """SentencePiece's algorithm, as llama.cpp has it: again and again the neighbours whose token has the best score."""
    assert vocabulary.scores is not None
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        place = -max(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [
        part
        for piece in pieces
        for part in ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((pre_tokenizers.ByteLevel(add_prefix_space=False),), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm"),
        (
            (pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)),
            "llama-bpe",
        ),
        ((pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)), "qwen2"),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_how_text_is_split_is_read_from_the_tokenizer(steps: tuple, name: str) -> None:
    assert vocabulary_of("model", split_by(*steps), 300).split == name


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    odd = split_by(pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False))
    with pytest.raises(
        SwquantError,
        match=r"^model: how its tokenizer splits text \(Split, ByteLevel\) has no name .*--tokenizer FILE$",
    ):
        vocabulary_of("model", odd, 300)
    save_tokenizer(tmp_path)
    with pytest.raises(
        SwquantError, match=r"^model: GGUF holds tokenizers that merge pairs \(BPE\), this one is WordLevel"
    ):
        of(tmp_path, 128)
    save_byte_level(tmp_path / "other")
    with pytest.raises(SwquantError, match="has the id 314, its embedding 128 rows"):
        of(tmp_path / "other", 128)


def test_the_probe_is_the_converters() -> None:
    assert sha256(PROBE.encode()).hexdigest() == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    assert all(len(digest) == 64 for digest in KNOWN)
