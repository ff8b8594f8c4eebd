"""Text to token ids, checked: the one way in which swquant asks a tokenizer.

Tokenizers come from elsewhere, as weights do, and fail in three ways. They know tokens that the embedding has no row
for (a fine-tune added them, or the tokenizer is another model's): torch then reports an index, not a word. They make
more tokens than the model takes. And the Rust library underneath panics, with an exception that is none: pyo3's
PanicException derives from BaseException, passes every `except Exception` and looks like the end of the program.
"""

from __future__ import annotations

from typing import Any

from exporters.errors import SwquantError
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.guard import failures_of

__all__ = ["begins_with", "context_of", "encode"]


def context_of(config: Any) -> int | None:
    """How many tokens a model takes, None where its configuration names no limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or None


def encode(checkpoint: ModelFolder, text: str, *, special: bool = True, tokenizer: Any = None) -> list[int]:
    """Token ids of a text, each one that the model has an embedding for; none for a text without content.

    special: with the tokens that the tokenizer adds by itself (a BOS in front). tokenizer: the checkpoint's, where it
    is loaded already. Raises SwquantError.
    """
    tokenizer = checkpoint.tokenizer() if tokenizer is None else tokenizer
    with failures_of(
        f"{checkpoint.name}: the tokenizer cannot read this text",
        "put the tokenizer.json of the original model beside config.json",
    ):
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    rows = getattr(checkpoint.config.get_text_config(), "vocab_size", None)
    for token in ids:
        if not isinstance(token, int) or token < 0 or (rows is not None and token >= rows):
            known = f"the model knows 0 to {rows - 1}" if rows is not None else "which is no id"
            raise SwquantError(
                f"{checkpoint.name}: the tokenizer produced token {token}{_word(tokenizer, token)}, {known}; leave it out "
                "of the text, or the tokenizer belongs to another model"
            )
    return ids


def begins_with(checkpoint: ModelFolder, tokenizer: Any = None) -> int | None:
    """The BOS token where the tokenizer begins a text with it, else None. tokenizer: the checkpoint's, where it is
    loaded already."""
    tokenizer = checkpoint.tokenizer() if tokenizer is None else tokenizer
    bos = tokenizer.bos_token_id
    with_special = encode(checkpoint, "a", tokenizer=tokenizer)
    return bos if bos is not None and with_special and with_special[0] == bos else None


def _word(tokenizer: Any, token: object) -> str:
    """What a token stands for, in parentheses, where that can be told."""
    try:
        return f" ({tokenizer.convert_ids_to_tokens(token)})"
    except Exception:
        return ""
