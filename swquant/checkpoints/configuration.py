"""config.json: how it is read here, and what of it is handed on.

A configuration says what a model is, and sometimes also what its last owner ran it with: Python files of the folder, an
attention kernel of a package that few have. The model is taken at its word, the owner is not: code runs only where
the user trusts it, and attention is computed with what transformers has by itself. What is written for others asks for
neither, so that it loads where nothing but transformers is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from exporters.errors import SwquantError, first_line
from exporters.text import shown
from swquant.checkpoints.companions import without_lost_code
from swquant.checkpoints.guard import silent_transformers
from swquant.pr_moe import register

__all__ = ["attention_note", "handed_on", "load_config"]

_OWN_ATTENTION = (None, "eager", "sdpa")
_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")

register()  # mixtures, which transformers does not know by itself


def load_config(folder: Path, raw: Mapping[str, Any], name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The transformers configuration of a folder whose config.json is `raw`. Runs code of the folder only where that is
    trusted. A model that transformers knows by itself needs none, even if it brings some."""
    if raw.get("auto_map") and str(raw.get("model_type")) not in CONFIG_MAPPING and not trust_remote_code:
        raise SwquantError(
            f"{name}: the model brings Python code of its own, which was not run; "
            "read it, and if you trust it, add --trust-remote-code"
        )
    try:
        with silent_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises nearly everything here
        raise SwquantError(
            f"{name}: config.json is not usable ({first_line(error)}); correct it, or fetch it again"
        ) from None
    if _foreign_attention(raw):
        config._attn_implementation = None
    _check_padding(config, name)
    return config


def _check_padding(config: PreTrainedConfig, name: str) -> None:
    """Raise SwquantError for a padding id that torch refuses to make an embedding with."""
    text = config.get_text_config()
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows > 0:
        raise SwquantError(
            f"{name}: config.json has pad_token_id {padding}, the embedding has rows 0 to {rows - 1}; "
            "set it to null, or to the id of a token"
        )


def _foreign_attention(raw: Mapping[str, Any]) -> str | None:
    """The attention implementation that a configuration asks for, where transformers does not have it by itself."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, Mapping))):
        for key in _ATTENTION_KEYS:
            if (wanted := part.get(key)) not in _OWN_ATTENTION:
                return str(wanted)
    return None


def attention_note(raw: Mapping[str, Any]) -> str | None:
    """One line on an attention implementation that is not handed on, None where there is none."""
    if (wanted := _foreign_attention(raw)) is None:
        return None
    return f"config.json asks for the attention implementation {shown(wanted, 60)}; left out, a loader chooses its own"


def handed_on(raw: Mapping[str, Any], *, code: bool) -> dict[str, Any]:
    """A configuration as it is written for others. code: whether the folder's Python files are handed on, too."""
    config = dict(raw) if code else without_lost_code(raw)
    if _foreign_attention(raw) is None:
        return config
    kept = {key: value for key, value in config.items() if key not in _ATTENTION_KEYS}
    return {key: handed_on(value, code=True) if isinstance(value, Mapping) else value for key, value in kept.items()}
