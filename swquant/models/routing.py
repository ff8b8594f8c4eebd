"""Routing: which set of a pool answers an input, told by the input alone.

Every task has a key: mean and spread of its *features*, the mean embedding of pieces of 32 tokens. An input is cut into
such pieces, too, and goes to the task under whose key they are likeliest, as independent normal variables, among those
tasks that it fits: a piece of text that lies farther from a key than the task's own text ever did (its *limit*) is not
that task's. The base's own text has a key like any task, and what fits no task is the base's, so that a text from
elsewhere meets the model that it would have met without a pool.

A routed model chooses when a text begins (`generate` then goes on with what was chosen), for every row of a batch, and
reads a set when it is first chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import Blocks
from exporters.pool_file import BASE
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.pool import ChosenSet, open_set, pool_of
from swquant.models.architecture import LinearWeight, describe

__all__ = ["Key", "Router", "choose", "key_of", "pieces_of", "route", "router_of"]

_PIECE = 32
_LEAST = 1e-3  # of the spread over all dimensions, for one in which a task never differs
_SLACK = 1.5


def pieces_of(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features of a text int64 [tokens]: float32 [pieces, d], and how many tokens [pieces] each is the mean of. A rest
    shorter than half a piece belongs to the piece before it."""
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids.to(model.device)).to(torch.float32)
    count = max((len(ids) + _PIECE // 2) // _PIECE, 1)
    cut = [vectors[number * _PIECE : (number + 1) * _PIECE if number < count - 1 else None] for number in range(count)]
    return torch.stack([piece.mean(dim=0) for piece in cut]).cpu(), torch.tensor([len(piece) for piece in cut])


@dataclass(frozen=True)
class Key:
    """mean, spread: float32 [d] of a task's pieces. limit: how far, by `distance`, a text of the task lies at most.
    set: that serves it, None for the base."""

    mean: Tensor
    spread: Tensor
    limit: float
    set: str | None

    def distance(self, pieces: Tensor, sizes: Tensor) -> float:
        """Mean square of (piece - mean) / spread, about 1 for the task's own text; a short piece varies more, and
        counts less."""
        each = ((pieces - self.mean) / self.spread).square().mean(dim=1)
        return float((each * (sizes / _PIECE).clamp(max=1)).mean())

    def likelihood(self, pieces: Tensor, sizes: Tensor) -> float:
        """Log-likelihood per dimension, up to a constant."""
        return -0.5 * self.distance(pieces, sizes) - float(self.spread.log().mean())


def key_of(model: PreTrainedModel, texts: Iterable[Tensor], held: Iterable[Tensor], of_set: str | None) -> Key:
    """The key of a task, from texts int64 [tokens] that it is trained on and those held out, by which the limit is
    set."""
    seen = [pieces_of(model, text) for text in texts]
    vectors = torch.cat([pieces for pieces, _ in seen])
    spread = vectors.std(dim=0, correction=0)
    spread = spread.clamp_min(float(vectors.std()) * _LEAST + 1e-12)
    key = Key(vectors.mean(dim=0), spread, 0.0, of_set)
    farthest = max(key.distance(*pieces) for pieces in [*(pieces_of(model, text) for text in held), *seen])
    return Key(key.mean, key.spread, _SLACK * farthest, of_set)


def choose(keys: Mapping[str, Key], model: PreTrainedModel, ids: Tensor) -> str:
    """The task whose key a text int64 [tokens] fits best, `base` where it fits none."""
    pieces = pieces_of(model, ids)
    fitting = {task: key for task, key in keys.items() if key.set is None or key.distance(*pieces) <= key.limit}
    return max(fitting, key=lambda task: fitting[task].likelihood(*pieces), default=BASE)


class Router:
    """What a routed model consults. chosen: the task of every row of the batch at hand; counts: task -> how many texts
    it was chosen for."""

    def __init__(self, checkpoint: CompressedCheckpoint, model: PreTrainedModel) -> None:
        pool = pool_of(checkpoint.manifest, checkpoint.name)
        self._folder, self._manifest, self._name = checkpoint.folder, checkpoint.manifest, checkpoint.name
        self.chosen: list[str] = []
        self.counts: Counter[str] = Counter()
        self.keys: dict[str, Key] = {}
        self._laid: dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
        weights: set[str] = set()
        for of_set in (BASE, *pool["sets"]):
            with open_set(self._folder, self._manifest, of_set, self._name) as file:
                weights |= set(file.weights)
                for task, key in file.keys().items():
                    own = of_set == BASE
                    limit = pool["limit"] if own else pool["sets"][of_set]["tasks"][task]["limit"]
                    self.keys[task] = Key(key[0], key[1], limit, None if own else of_set)
        self._weights = {name: weight for name, weight in describe(checkpoint).weights.items() if name in weights}
        self._watch(model)

    def _watch(self, model: PreTrainedModel) -> None:
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, weight in self._weights.items():
            model.get_submodule(weight.module).register_forward_hook(self._adder(name))

    def _begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose, where a text begins."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            return
        if ids is None:  # no tokens to choose by
            self.chosen = []
            return
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.ndim != 2 else mask.bool()
        self.chosen = [choose(self.keys, model, row[kept]) for row, kept in zip(ids, real, strict=True)]
        self.counts.update(self.chosen)

    def _adder(self, name: str) -> Any:
        def add(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            """Add what the rows' sets add to this layer."""
            sets = [self.keys[task].set if task in self.keys else None for task in self.chosen]
            if not any(sets):
                return output
            x, rows = args[0], len(sets)
            flat_x, flat_y = x.reshape(rows, -1, x.shape[-1]), output.reshape(rows, -1, output.shape[-1])
            for of_set in dict.fromkeys(item for item in sets if item is not None):
                if (blocks := self._blocks(of_set, output).get(name)) is not None:
                    at = torch.tensor(
                        [place for place, item in enumerate(sets) if item == of_set], device=output.device
                    )
                    flat_y = flat_y.index_add(0, at, product(flat_x[at], blocks, output.shape[-1]))
            return flat_y.reshape(output.shape)

        return add

    def _blocks(self, of_set: str, like: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Stored name -> output blocks, input blocks, values [n, B, B] of a set, read when it is first asked for."""
        if of_set not in self._laid:
            chosen = ChosenSet(self._folder, self._manifest, of_set, self._name)
            try:
                self._laid[of_set] = {
                    name: _oriented(chosen.blocks(name, self._shape(name))[0], self._weights[name], like)
                    for name in chosen.weights
                }
            finally:
                chosen.close()
        return self._laid[of_set]

    def _shape(self, name: str) -> tuple[int, int]:
        rows, cols = self._manifest["tensors"][name]["shape"]
        return rows, cols


def _oriented(blocks: Blocks, weight: LinearWeight, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols, values = blocks.rows.long(), blocks.cols.long(), blocks.values
    if weight.transposed:
        rows, cols, values = cols, rows, values.mT
    return rows.to(like.device), cols.to(like.device), values.to(like)


def product(x: Tensor, blocks: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """x [rows, tokens, in] through blocks alone: [rows, tokens, size]."""
    to, of, values = blocks
    side = values.shape[-1]
    read = torch.nn.functional.pad(x, (0, -x.shape[-1] % side)).unflatten(-1, (-1, side))[..., of, :]
    made = torch.einsum("btni,noi->btno", read, values)
    y = x.new_zeros(*x.shape[:2], -(-size // side), side)
    return y.index_add_(2, to, made).flatten(2)[..., :size]


def route(model: PreTrainedModel, checkpoint: CompressedCheckpoint) -> None:
    """From now on the model chooses a set for every text; `router_of` tells which. Raises SwquantError."""
    model.router = Router(checkpoint, model)  # type: ignore[assignment]


def router_of(model: Any) -> Router | None:
    """What a routed model consults, None for any other."""
    found: Router | None = getattr(model, "router", None)
    return found if isinstance(found, Router) else None
