"""The workshop: the base, running, and the sets of its pool, which are laid over it and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from calibrationless import Blocks
from calibrationless.subspaces import basis_of
from exporters.pool_file import BASE, StoredSet
from swquant.adapt.options import AdaptOptions
from swquant.adapt.spaces import columns_of, moments_of
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.architecture import LinearWeight
from swquant.models.routing import Key
from swquant.parallel import world
from swquant.training.data import Corpus
from swquant.training.model import lay
from swquant.training.patched_linear import PatchedLinear
from swquant.tune.session import Session

__all__ = ["Workshop"]


@dataclass
class Workshop:
    """model: the base, whose layers are replaced while a set is laid. weights: those that blocks can be laid over. own:
    text that the base wrote. sets: name -> set, without `base`; base_key: that of the own text."""

    model: PreTrainedModel
    checkpoint: CompressedCheckpoint
    weights: Mapping[str, LinearWeight]
    options: AdaptOptions
    own: Corpus
    base_key: Key
    sets: dict[str, StoredSet] = field(default_factory=dict)

    @contextmanager
    def laid(self, blocks: Mapping[str, Blocks]) -> Iterator[dict[str, PatchedLinear]]:
        """The model with blocks over its weights. Gives stored name -> layer."""
        places = {name: self.weights[name].module for name in blocks}
        before = {path: self.model.get_submodule(path) for path in places.values()}
        weights = {name: self.weights[name] for name in blocks}
        try:
            yield lay(self.model, self.checkpoint, weights, blocks, packed=False)
        finally:
            for path, module in before.items():
                parent, _, leaf = path.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, module)

    def session(self, corpus: Corpus, held: Corpus) -> Session:
        """What gives losses of the model as it is laid at the moment."""
        return Session(self.model, None, corpus, held, self.options.training)

    def keys(self) -> dict[str, Key]:
        """Task -> key, `base` among them."""
        found = {BASE: self.base_key}
        for of_set, stored in self.sets.items():
            for task, key in stored.keys.items():
                found[task] = Key(key[0], key[1], stored.record["tasks"][task]["limit"], of_set)
        return found

    def spaces(
        self,
        blocks: Mapping[str, Blocks],
        losses: list[Callable[[], Tensor]],
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Stored name -> basis [k, B, r] of what the layers with these blocks see in some passes, more columns of
        `known` where there is one."""
        wanted = {name: (self.weights[name], columns_of(item, self.weights[name])) for name, item in blocks.items()}
        energy = self.options.energy

        def found() -> dict[str, Tensor]:
            moments = moments_of(self.model, wanted, self.options.block, losses)
            return {
                name: basis_of(moment, energy, None if known is None else known[name])
                for name, moment in moments.items()
            }

        return world().same_tensors(found)

    def own_losses(self) -> list[Callable[[], Tensor]]:
        """The passes of the base's own text."""
        session = self.session(self.own, self.own)
        return [lambda batch=batch: session.loss(batch) for batch in self.own.batches(self.options.batch)]  # type: ignore[misc]
