"""generation_config.json: how a model is to be asked, checked before anybody relies on it.

transformers takes the settings as they are and stumbles where it uses them, in the middle of an answer. What has the
wrong type, or what its own check refuses, is said when the file is read; a compressed copy would carry it on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from exporters.errors import CheckpointError, first_line
from exporters.json_file import read_json
from exporters.text import shown
from swquant.checkpoints.guard import silent_transformers

__all__ = ["GENERATION", "read_generation"]

GENERATION = "generation_config.json"


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float) and abs(value) < float("inf"))


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _id(value: object) -> bool:
    return _whole(value) and -1 <= value < 2**31  # type: ignore[operator]  # -1: files of old say so for none


def _ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_id, value))


def _id_or_ids(value: object) -> bool:
    return _id(value) or _ids(value)


def _text(value: object) -> bool:
    return isinstance(value, str)


# What a setting is, in words -> how it is told, the settings. None is allowed for all of them.
_TYPES: dict[str, tuple[Callable[[object], bool], tuple[str, ...]]] = {
    "true or false": (
        _flag,
        ("do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
         "return_dict_in_generate", "renormalize_logits", "remove_invalid_values", "token_healing", "is_assistant",
         "disable_compile", "use_mtp", "low_memory", "_from_model_config"),
    ),
    "a whole number": (
        _whole,
        ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_beam_groups", "top_k",
         "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "prompt_lookup_num_tokens",
         "num_assistant_tokens", "max_matching_ngram_size", "max_cache_len", "prefill_chunk_size"),
    ),
    "a number": (
        _number,
        ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
         "encoder_repetition_penalty", "length_penalty", "diversity_penalty", "penalty_alpha", "guidance_scale",
         "max_time", "assistant_confidence_threshold"),
    ),
    "an id": (_id, ("pad_token_id", "bos_token_id", "forced_bos_token_id")),
    "an id or a list of ids": (_id_or_ids, ("eos_token_id", "forced_eos_token_id", "decoder_start_token_id")),
    "a list of ids": (_ids, ("suppress_tokens", "begin_suppress_tokens")),
    "text": (_text, ("cache_implementation", "transformers_version")),
}  # fmt: skip


def read_generation(path: Path) -> dict[str, Any]:
    """The settings of a file. Raises CheckpointError for what transformers could not use."""
    settings = read_json(path)
    _check_types(path, settings)
    try:
        with silent_transformers():
            GenerationConfig.from_dict(dict(settings))
    except Exception as error:  # its own check raises nearly everything
        raise CheckpointError(f"{path}: not usable ({first_line(error)}); correct it, or fetch it again") from None
    return settings


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the first setting that is of another type than it has to be."""
    for what, (fits, names) in _TYPES.items():
        for name in names:
            if (value := settings.get(name)) is not None and not fits(value):
                raise CheckpointError(
                    f"{path}: {name} is {shown(repr(value), 60)}, not {what}; correct it, or delete the entry"
                )
