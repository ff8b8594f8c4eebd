"""Where the arithmetic of a model changes with the length of a text, and how far the check after an export follows it.

sliding window, chunks   a token sees no more than so many before it: from there on a missing window is seen
longrope                 other rotary frequencies behind `original_max_position_embeddings`
dynamic rope             frequencies that follow the length behind `max_position_embeddings`

Other kinds of scaled rotary embeddings (linear, yarn, llama3) are the same at any length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

__all__ = ["BEHIND", "changes_of", "length_past", "pieces_of", "reached", "rope_types", "windows_of"]

BEHIND = 8  # tokens that are run behind a change
_BEFORE = 4  # tokens before it from which on they are run one by one
# What a check may take: tokens; logits (a GiB of float32); tokens times weights (some minutes on a few cores).
_TOKENS, _LOGITS, _PRODUCTS = 4096 + BEHIND, 1 << 28, 4 * 10**12


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The sliding window of every layer, None where it sees everything: transformers' own rule for its caches."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) or None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * int(getattr(text, "num_hidden_layers", 0))
    return tuple(window if "sliding" in kind else None for kind in kinds)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of the rotary embeddings: one set, or one for each kind of layers."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary embeddings of a model."""
    return {rope.get("rope_type", "default") for rope in _ropes(config)}


def changes_of(config: Any) -> tuple[int, ...]:
    """The lengths behind which a model computes otherwise, sorted; none that its positions do not reach."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    found: set[int | None] = {*windows_of(config)}
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        found.add(text.attention_chunk_size)
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            found.add(rope.get("original_max_position_embeddings"))
    lengths = {length for length in found if length is not None and (most is None or length < most)}
    return tuple(sorted({*lengths, most} if most is not None and _dynamic(config) else lengths))


def _dynamic(config: Any) -> bool:
    return any("dynamic" in kind for kind in rope_types(config))


def length_past(config: Any, changes: Sequence[int]) -> int:
    """The length of a sequence that goes past all of `changes` and not past the model's positions."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return changes[-1] + BEHIND if most is None or _dynamic(config) else min(changes[-1] + BEHIND, most)


def reached(model: PreTrainedModel, changes: Sequence[int]) -> tuple[int, ...]:
    """The changes that a check can afford to go past."""
    logits = _LOGITS // model.config.get_text_config().vocab_size
    most = min(_TOKENS, logits, _PRODUCTS // max(1, model.num_parameters()))
    return tuple(change for change in changes if change + BEHIND <= most)


def pieces_of(changes: Sequence[int], length: int) -> list[slice]:
    """A sequence of `length` tokens as it is run through the cache: one by one past every change, at once between."""
    borders = {0, length}
    for change in changes:
        borders |= {*range(max(0, change - _BEFORE), min(change + BEHIND, length) + 1)}
    return [slice(start, stop) for start, stop in pairwise(sorted(borders))]
