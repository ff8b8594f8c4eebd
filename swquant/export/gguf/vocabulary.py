"""The vocabulary of a GGUF file, made from a Hugging Face tokenizer: tokens, kinds, merges or scores, the splitting.

llama.cpp has two tokenizers that matter here. `gpt2` is byte-level BPE with merges; how it cuts text into words before
that is code, chosen by a name (`tokenizer.ggml.pre`). The converter of llama.cpp knows a tokenizer by the ids that it
gives for one odd text; where it is not among these, its own tokenizer.json says which expression it splits by. `llama`
is SentencePiece's BPE, which merges by the score of the token that comes of it: the rank of its first merge, turned
round. Everything else is refused: a vocabulary that is nearly right answers nearly right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from exporters.errors import SwquantError

__all__ = ["Vocabulary", "add_vocabulary", "vocabulary_of"]

# What llama.cpp's converter encodes, to know a tokenizer by.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis con"
    "catenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3"
    "...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Българ"
    "ски ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'R"
    "E you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
# sha256 of the ids -> how llama.cpp splits, from its converter
KNOWN = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # meta-llama/Meta-Llama-3-8B
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen/Qwen1.5-7B
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen/Qwen3-Embedding-0.6B
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",  # openai-community/gpt2
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # HuggingFaceTB/SmolLM-135M
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # mistralai/Mistral-Nemo-Base-2407
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",  # mistral-community/pixtral-12b
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",  # allenai/OLMo-1.7-7B-hf
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",  # microsoft/phi-2
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # databricks/dbrx-base
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",  # deepseek-ai/deepseek-llm-7b-base
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",  # deepseek-ai/deepseek-coder-6.7b-base
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",  # deepseek-ai/DeepSeek-V3
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",  # deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",  # tiiuae/Falcon3-7B-Base
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",  # bigcode/starcoder2-3b
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",  # stabilityai/stablelm-2-zephyr-1_6b
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # abacusai/Smaug-Llama-3-70B-Instruct
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Xenova/gpt-4o
}
# The expression of a tokenizer.json -> how llama.cpp splits by it
_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+"
)
_EXPRESSIONS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}

# Tokens that are control tokens though their tokenizer says otherwise.
_CONTROL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPACE = "\u2581"  # SentencePiece's
_KIND = gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """model: gpt2 or llama. split: `tokenizer.ggml.pre`. scores: of llama alone. merges: of gpt2 alone. space_prefix:
    whether text gets a space in front, None where that is not said."""

    model: str
    split: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] | None
    space_prefix: bool | None


def vocabulary_of(model: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, as many tokens as the embedding has rows. Raises SwquantError for a kind that
    GGUF cannot hold."""
    if not tokenizer.is_fast:
        raise SwquantError(f"{model}: its tokenizer has no tokenizer.json; save it with transformers as a fast one")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"].get("type")
    if kind != "BPE":
        raise SwquantError(
            f"{model}: GGUF holds tokenizers that merge pairs (BPE), this one is {kind}; take another model"
        )
    if (longest := max(tokenizer.get_vocab().values())) >= size:
        raise SwquantError(
            f"{model}: its tokenizer has the id {longest}, its embedding {size} rows; they do not belong together"
        )
    if described["model"].get("byte_fallback"):
        return _sentencepiece(tokenizer, described, size)
    tokens, kinds = _byte_level(tokenizer, size)
    return Vocabulary("gpt2", _split(model, tokenizer, described), tokens, kinds, None, None)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the keys of a vocabulary. folder: has tokenizer.json and its companions, for what is special in it."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    special.add_to_gguf(writer, quiet=True)


def _split(model: str, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any]) -> str:
    """How llama.cpp splits text as this tokenizer does."""
    ids = tokenizer.encode(PROBE)
    if known := KNOWN.get(hashlib.sha256(str(ids).encode()).hexdigest()):
        return known
    splitter = described.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    known = _EXPRESSIONS.get(steps[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and known:
        return known
    raise SwquantError(
        f"{model}: how its tokenizer splits text ({', '.join(map(str, kinds))}) has no name in llama.cpp that is known here; "
        "give a GGUF file of the same model with --tokenizer FILE"
    )


def _looks_special(token: str) -> bool:
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in _CONTROL or any(token.startswith(start) and token.endswith(end) for start, end in ends)


def _added(tokenizer: PreTrainedTokenizerBase, number: int, token: str, *, decoded: bool) -> tuple[str, int]:
    """An added token as llama.cpp matches it in text, and its kind."""
    entry = tokenizer.added_tokens_decoder[number]
    if decoded and not entry.normalized:
        token = str(tokenizer.decode(tokenizer.encode(token, add_special_tokens=False)))
    if entry.special or _looks_special(token):
        return token, int(_KIND.CONTROL)
    return token.replace(_SPACE, " "), int(_KIND.USER_DEFINED)


def _byte_level(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    found = []
    for number in range(size):
        if number not in names:
            found.append((f"[PAD{number}]", int(_KIND.UNUSED)))
        elif number in added:
            found.append(_added(tokenizer, number, names[number], decoded=True))
        else:
            found.append((names[number], int(_KIND.NORMAL)))
    tokens, kinds = zip(*found, strict=True)
    return tokens, kinds


def _sentencepiece(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], size: int) -> Vocabulary:
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added, unknown = tokenizer.added_tokens_decoder, described["model"].get("unk_token")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ", 1)), rank)
    tokens, kinds, scores = [], [], []
    for number in range(size):
        token, kind, score = names.get(number, f"[PAD{number}]"), int(_KIND.NORMAL), 0.0
        if number not in names:
            kind, score = int(_KIND.UNUSED), -10000.0
        elif token == unknown:
            kind = int(_KIND.UNKNOWN)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = int(_KIND.BYTE)
        elif number in added:
            (token, kind), score = _added(tokenizer, number, token, decoded=False), -1000.0
        else:
            score = -float(ranks.get(token, len(ranks)))  # what no merge makes (single characters) comes last
        tokens.append(token)
        kinds.append(kind)
        scores.append(score)
    return Vocabulary("llama", "default", tuple(tokens), tuple(kinds), tuple(scores), _space_prefix(described))


def _space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether text is given a space in front."""
    for part in ("normalizer", "pre_tokenizer"):
        steps = described.get(part) or {}
        for step in steps.get("normalizers", steps.get("pretokenizers", [steps])):
            if step.get("type") == "Prepend" or (
                step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
            ):
                return True
    return False
