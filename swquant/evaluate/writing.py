"""`generate`: what a model says, token by token, always the likeliest.

It ends where the model's generation_config.json says that a text ends (or config.json, where there is none), and after
`tokens` tokens at the latest. With `chat` the prompt is a user's words in the model's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from calibrationless import CPU
from exporters.errors import SwquantError, first_line
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.guard import failures_of
from swquant.checkpoints.tokenizer import context_of, encode
from swquant.evaluate.pipeline import runnable_model
from swquant.models.loading import quiet
from swquant.progress import Progress, silent

__all__ = ["generate_text"]


def generate_text(
    checkpoint: ModelFolder,
    prompt: str,
    *,
    tokens: int = 40,
    chat: bool = False,
    device: torch.device = CPU,
    on_text: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> str:
    """Continue a prompt greedily by at most `tokens` tokens. Returns prompt and continuation, with `chat` the answer.

    on_text: is given the same, piece by piece. Raises SwquantError.
    """
    if tokens < 1:
        raise SwquantError(f"{tokens} tokens are nothing to generate; give 1 or more")
    with quiet():
        tokenizer = checkpoint.tokenizer()
        ids = _chat_ids(checkpoint, prompt, tokenizer) if chat else encode(checkpoint, prompt, tokenizer=tokenizer)
        if not ids:
            raise SwquantError("the prompt is empty; give some words to continue")
        context = context_of(checkpoint.config)
        if context is not None and len(ids) + tokens > context:
            raise SwquantError(
                f"{checkpoint.name}: a prompt of {len(ids)} tokens and {tokens} to generate are more than the {context} "
                "that the model takes; shorten the prompt, or lower --tokens"
            )
        with progress.step("Generating" if on_text is None else f"Loading {checkpoint.name}"):
            model: Any = runnable_model(checkpoint, device)
            if on_text is None:
                return _written(checkpoint, model, tokenizer, ids, tokens, chat, None)
        return _written(checkpoint, model, tokenizer, ids, tokens, chat, on_text)


def _chat_ids(checkpoint: ModelFolder, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a user's words in the chat template. Raises SwquantError where the model has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise SwquantError(f"{checkpoint.name}: its tokenizer has no chat template; leave out --chat")
    said = [{"role": "user", "content": prompt}]
    with failures_of(f"{checkpoint.name}: its chat template does not take this", "leave out --chat"):
        text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    return encode(checkpoint, text, special=False, tokenizer=tokenizer)  # a template writes the BOS itself


class _Pieces(BaseStreamer):
    """Gives text on as it grows, once there is a token that is new. A token may be a part of a character, and one that
    follows may join words: what may still change waits for the end. skip: so many tokens are not shown."""

    def __init__(self, decode: Callable[[list[int]], str], skip: int, on_text: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self._decode, self._skip, self._on_text, self._said = decode, skip, on_text, ""

    def put(self, value: torch.Tensor) -> None:
        """More token ids, int64."""
        began = bool(self.ids)  # the first are the prompt's: who is refused by then sees no half of an answer
        self.ids += value.flatten().tolist()
        if not began:
            return
        text = self._decode(self.ids[self._skip :])
        words = text.rstrip("\ufffd").rstrip()
        if words.startswith(self._said):
            self._give(words)

    def end(self) -> None:
        """No more."""
        self._give(self._decode(self.ids[self._skip :]))

    def _give(self, text: str) -> None:
        if len(text) > len(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text


def _written(
    checkpoint: ModelFolder,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    tokens: int,
    chat: bool,
    on_text: Callable[[str], None] | None,
) -> str:
    """The text of the prompt's ids and of what the model adds, or of the latter alone."""
    skip = len(ids) if chat else 0

    def decode(some: list[int]) -> str:
        with failures_of(
            f"{checkpoint.name}: the tokenizer cannot write this text", "its tokenizer.json is damaged, fetch it again"
        ):
            return str(tokenizer.decode(some, skip_special_tokens=True))

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = torch.tensor([ids], device=model.device if isinstance(model, PreTrainedModel) else None)
    pieces = None if on_text is None else _Pieces(decode, skip, on_text)
    try:
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            pad_token_id=pad,
            tokenizer=tokenizer,  # for settings that end a text at some words
            streamer=pieces,
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a setting that fails where it is used
        raise SwquantError(
            f"{checkpoint.name}: transformers cannot write with these settings ({first_line(error)}); correct "
            "generation_config.json, or move it away"
        ) from None
    return decode(output[0].tolist()[skip:])
