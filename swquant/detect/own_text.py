"""Text that the model writes itself, and what its own text does to its inputs: second-order statistics without data.

Texts of 256 tokens, sixteen unless asked for more, are sampled at temperature 1, each from BOS or, where the tokenizer
has none, from a random token. For the weights of a few layers at a time the texts are read once more, and for every
input of a linear weight the Gram matrix X^T X is summed up. How many at a time is set by memory: Gram matrices of all
layers would be larger than the model.

Everything runs on one thread with a seeded generator, so the same model gives the same text and the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import damping_for, inverse_factor
from swquant.checkpoints.base import Checkpoint
from swquant.detect.found import Found
from swquant.detect.pipeline import probed_model, watchable
from swquant.models.architecture import LinearKind
from swquant.progress import Progress

__all__ = ["SelfText", "self_text", "start_token", "write_text"]

LENGTH = 256  # tokens of a text
_GRAM_BYTES = 1 << 30  # Gram matrices in memory at a time
_BATCH = 4

Factor = tuple[Tensor, Tensor]


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


class SelfText:
    """Factors of Gram matrices by stored weight name, collected a few layers at a time."""

    def __init__(self, model: PreTrainedModel, found: Found, tokens: Tensor, names: Sequence[str]) -> None:
        self._model, self._found, self._tokens = model, found, tokens
        self._waiting = list(names)
        self._grams: dict[str, Tensor] = {}
        self._last: tuple[tuple[str, bool], Factor, Tensor] | None = None

    def statistics(self, name: str, exponents: Tensor | None) -> tuple[Factor, Tensor] | None:
        """(factor, importance [in]) of a stored weight, its columns scaled by 2^exponents; None for an expert."""
        key = self._key(name)
        if key is None:
            return None
        if key not in self._grams:
            self._collect(name)
        known = (key, exponents is not None)
        if self._last is None or self._last[0] != known:
            gram = self._grams[key]
            if exponents is not None:
                inverse = torch.exp2(-exponents.to(torch.float32))
                gram = gram * inverse * inverse.unsqueeze(1)
            with watchable(self._model):
                self._last = (known, inverse_factor(gram, damping_for(self._tokens.numel())), gram.diagonal().clone())
        return self._last[1], self._last[2]

    def _key(self, name: str) -> str | None:
        """Weights that read the same norm share one matrix."""
        weight = self._found.architecture.weights[name]
        if weight.kind is not LinearKind.LINEAR:
            return None
        return self._found.probe.linears[weight.watch].norm or name

    def _collect(self, name: str) -> None:
        """Matrices of this weight and of those that come after it, as many as fit."""
        self._grams.clear()
        wanted: dict[str, str] = {}  # module -> key
        size = 0
        for other in self._waiting[self._waiting.index(name) :]:
            key = self._key(other)
            if key is None or key in wanted.values():
                continue
            module = self._found.architecture.weights[other].module
            size += 4 * self._model.get_submodule(module).get_parameter("weight").shape[1] ** 2
            if wanted and size > _GRAM_BYTES:
                break
            wanted[module] = key

        def watch(key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).to(torch.float32)
                self._grams[key] = self._grams[key].addmm_(x.T, x) if key in self._grams else x.T @ x

            return keep

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(watchable(self._model))
            for module, key in wanted.items():
                stack.callback(self._model.get_submodule(module).register_forward_pre_hook(watch(key)).remove)
            for batch in self._tokens.split(_BATCH):
                self._model.base_model(input_ids=batch, use_cache=False)


@contextmanager
def self_text(
    checkpoint: Checkpoint,
    found: Found,
    names: Sequence[str],
    *,
    texts: int,
    low_memory: bool,
    seed: int,
    progress: Progress,
) -> Iterator[SelfText]:
    """The model with its own text. names: the stored weights that will be asked for, in that order."""
    with probed_model(checkpoint, low_memory) as model:
        with watchable(model):
            tokens = write_text(model, start_token(checkpoint, found), seed, progress, texts=texts)
        yield SelfText(model, found, tokens, names)
