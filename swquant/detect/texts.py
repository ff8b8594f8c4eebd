"""Text that a model writes itself: sampled at temperature 1, each from BOS or, where the tokenizer has none, from a
random token.

Everything runs on one thread with a seeded generator, so the same model gives the same text. All texts are written side
by side, a token of each at a time: a model whose weights stay in their files is read once per token, however many
texts there are. Another model may write them, too, if it has the same tokens: a smaller one of the family, or a
compressed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import CPU
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.tokenizer import context_of
from swquant.progress import Progress

__all__ = ["LENGTH", "length_for", "other_writer", "runs_on", "write_text"]

LENGTH = 256  # tokens of a text


def length_for(checkpoint: Checkpoint) -> int:
    """Tokens of a text: 256, or what the model takes if that is less."""
    return min(LENGTH, context_of(checkpoint.config) or LENGTH)


@contextmanager
def other_writer(name: str, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The model of this name, which is to write text for `checkpoint`. Raises SwquantError where its tokens are not the
    same, or it takes fewer of them."""
    with open_checkpoint(name, trust_remote_code=checkpoint.trust_remote_code) as other:
        theirs, ours = other.tokenizer().get_vocab(), checkpoint.tokenizer().get_vocab()
        if theirs != ours:
            differing = len(theirs.items() ^ ours.items())
            raise SwquantError(
                f"{name}: its tokenizer is not that of {checkpoint.name} ({differing} entries differ); "
                "--text-from takes a model of the same family"
            )
        rows, known = (getattr(one.config.get_text_config(), "vocab_size", 0) for one in (other, checkpoint))
        if rows > known or length_for(other) < length_for(checkpoint):
            raise SwquantError(
                f"{name}: writes {rows} tokens in texts of {length_for(other)}, {checkpoint.name} reads {known} in texts of "
                f"{length_for(checkpoint)}; take another model for --text-from"
            )
        yield other


def runs_on(model: PreTrainedModel) -> torch.device:
    """Where tokens are given to it: of a model whose weights stay in their files, the CPU."""
    return CPU if model.device.type == "meta" else model.device


def write_text(
    model: PreTrainedModel,
    start: int | None,
    seed: int,
    progress: Progress,
    *,
    texts: int,
    length: int = LENGTH,
) -> Tensor:
    """int64 [texts, length] sampled from the model; start: the BOS token, or None for random first tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_output_embeddings().get_parameter("weight").shape[0]
    place = runs_on(model)
    first = torch.randint(vocabulary, (texts, 1), generator=generator)
    tokens = first if start is None else torch.full((texts, 1), start)
    cache, step = None, tokens
    with torch.no_grad(), progress.tokens("Writing text", texts * length) as bar:
        for _ in range(length - 1):
            result = model(input_ids=step.to(place), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            likely = result.logits[:, -1].float().softmax(dim=-1).cpu()
            step = torch.multinomial(likely, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
            bar.advance("", texts)
    return tokens
