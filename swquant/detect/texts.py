"""Text that a model writes itself: sampled at temperature 1, each from BOS or, where the tokenizer has none, from a
random token.

Everything runs on one thread with a seeded generator, so the same model gives the same text. All texts are written side
by side, a token of each at a time: a model whose weights stay in their files is read once per token, however many
texts there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import context_of
from swquant.detect.found import Found
from swquant.progress import Progress

__all__ = ["LENGTH", "length_for", "start_token", "write_text"]

LENGTH = 256  # tokens of a text


def length_for(checkpoint: Checkpoint) -> int:
    """Tokens of a text: 256, or what the model takes if that is less."""
    return min(LENGTH, context_of(checkpoint.config) or LENGTH)


def start_token(checkpoint: Checkpoint, found: Found) -> int | None:
    """The BOS token where the tokenizer begins a text with one, else None."""
    bos = checkpoint.tokenizer().bos_token_id
    return bos if bos is not None and found.token_ids[0] == bos else None


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
    first = torch.randint(vocabulary, (texts, 1), generator=generator)
    tokens = first if start is None else torch.full((texts, 1), start)
    cache, step = None, tokens
    with torch.no_grad(), progress.tokens("Writing text", texts * length) as bar:
        for _ in range(length - 1):
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            likely = result.logits[:, -1].float().softmax(dim=-1)
            step = torch.multinomial(likely, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
            bar.advance("", texts)
    return tokens
