"""What a model's own text does to its inputs: second-order statistics without data.

The texts that the model wrote (`texts`) are read once more, all of them side by side, one decoder layer at a time
(`swquant.models.layerwise`). While they pass through a layer, the Gram matrix X^T X of every input of a linear weight
in it is summed up; the layer's weights are rounded with these, and then they are dropped. So one pass is all, and what
is in memory is one layer's matrices (of all layers they would be larger than the model) and the texts' hidden states.
It is given the weights in the order of the layers (`compress.plan` sees to that); for one out of turn it begins again.

Everything runs on one thread, so the same model gives the same bytes. On a GPU that the model fits on, text, passes,
matrices and factors are made there, and stay there for the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calibrationless import CPU, Factor, damping_for, inverse_factor_
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.tokenizer import begins_with
from swquant.detect.found import Found
from swquant.detect.pipeline import probed_model, watchable
from swquant.detect.texts import length_for, other_writer, runs_on, write_text
from swquant.models.architecture import LinearKind
from swquant.models.converted import as_built
from swquant.models.layerwise import SideBySide, side_by_side
from swquant.progress import Progress

__all__ = ["SelfText", "self_text"]

_GRAM_BYTES = 1 << 30  # Gram matrices in memory at a time, of layers that run more than once
_BATCH = 4


class SelfText:
    """Factors of Gram matrices by stored weight name, collected a layer at a time."""

    def __init__(self, model: PreTrainedModel, found: Found, tokens: Tensor, names: Sequence[str]) -> None:
        self._model, self._found, self._tokens = model, found, tokens
        self._waiting = list(names)
        self._grams: dict[str, Tensor] = {}  # float32 [in, in]
        self._factors: dict[tuple[str, bool], tuple[Factor, Tensor]] = {}
        self._running = ExitStack()
        self._reading: SideBySide | None = None

    def close(self) -> None:
        """End the reading, wherever it is."""
        self._running.close()
        self._reading = None

    def statistics(self, name: str, exponents: Tensor | None) -> tuple[Factor, Tensor] | None:
        """(factor, importance [in]) of a stored weight, its columns scaled by 2^exponents; None for an expert, and for
        a weight that the text does not reach."""
        key = self._key(name)
        if key is None:
            return None
        wanted = (key, exponents is not None)
        if wanted not in self._factors:
            if key not in self._grams:
                self._collect(name)
            gram = self._grams.pop(key, None)
            if gram is None:
                return None
            self._factors[wanted] = self._factor(gram, exponents)
        return self._factors[wanted]

    def _factor(self, gram: Tensor, exponents: Tensor | None) -> tuple[Factor, Tensor]:
        """In the matrix's own memory."""
        if exponents is not None:
            inverse = torch.exp2(-exponents.to(gram.device, torch.float32))
            gram.mul_(inverse).mul_(inverse.unsqueeze(1))
        importance = gram.diagonal().clone()
        with watchable(self._model):
            return inverse_factor_(gram, damping_for(self._tokens.numel())), importance

    def _key(self, name: str) -> str | None:
        """Weights that read the same norm share one matrix."""
        weight = self._found.architecture.weights[name]
        if weight.kind is not LinearKind.LINEAR:
            return None
        record = self._found.probe.linears.get(weight.watch)
        return (record.norm if record is not None else None) or name

    def _repeated(self, name: str) -> bool:
        """Whether a pass runs the weight more than once: its matrix is complete only at the end of the pass."""
        record = self._found.probe.linears.get(self._found.architecture.weights[name].watch)
        return record is not None and record.products > 1  # None of an expert that the prompt did not reach

    def _collect(self, name: str) -> None:
        """Matrices of this weight and of those of its layer that come after it."""
        self._grams.clear()
        self._factors.clear()
        wanted = self._together(name)
        with watchable(self._model):
            if not self._repeated(name):
                with self._summed(wanted):
                    self._read_through(self._found.architecture.weights[name].layer)
            # Where the text did not come by in that layer, it may yet in another one.
            if missing := {module: key for module, key in wanted.items() if key not in self._grams}:
                with self._summed(missing):
                    self._read_all()

    def _together(self, name: str) -> dict[str, str]:
        """Module -> key of what is collected with a weight: the rest of its layer; for a weight that runs repeatedly
        what fits of all such, since each collection takes a pass."""
        weights, repeated = self._found.architecture.weights, self._repeated(name)
        wanted: dict[str, str] = {}
        size = 0
        for other in self._waiting[self._waiting.index(name) :]:
            key = self._key(other)
            if key is None or key in wanted.values() or self._repeated(other) is not repeated:
                continue
            module = weights[other].module
            size += 4 * self._model.get_submodule(module).get_parameter("weight").shape[1] ** 2
            if wanted and (size > _GRAM_BYTES if repeated else weights[other].layer != weights[name].layer):
                break
            wanted[module] = key
        return wanted

    @contextmanager
    def _summed(self, wanted: Mapping[str, str]) -> Iterator[None]:
        """Inside, the Gram matrices of what these modules are given are summed up. wanted: module -> key."""

        def watch(key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).to(torch.float32)
                self._grams[key] = self._grams[key].addmm_(x.T, x) if key in self._grams else x.T @ x

            return keep

        with ExitStack() as stack:
            for module, key in wanted.items():
                stack.callback(self._model.get_submodule(module).register_forward_pre_hook(watch(key)).remove)
            yield

    def _runs(self) -> list[Callable[[], object]]:
        tokens = self._tokens.to(runs_on(self._model))
        return [partial(self._model.base_model, input_ids=batch, use_cache=False) for batch in tokens.split(_BATCH)]

    def _read_through(self, layer: int) -> None:
        """Carry the texts on until they have been through a layer, from the beginning if they are past it."""
        if self._reading is None or self._reading.has_run(layer):
            self.close()
            passes = side_by_side(self._model, self._found.architecture.parts, self._runs())
            self._reading = self._running.enter_context(passes)
        while not self._reading.has_run(layer) and self._reading.step():
            pass

    def _read_all(self) -> None:
        with torch.no_grad():
            for run in self._runs():
                run()


@contextmanager
def self_text(
    checkpoint: Checkpoint,
    found: Found,
    names: Sequence[str],
    *,
    texts: int,
    text_from: str | None,
    low_memory: bool,
    seed: int,
    progress: Progress,
    device: torch.device = CPU,
) -> Iterator[SelfText]:
    """The model with its own text. names: the stored weights that will be asked for, in that order. text_from: the
    model that writes the text instead. device: where both run, if they fit there."""

    def written_by(writer: PreTrainedModel) -> Tensor:
        start, length = begins_with(checkpoint), length_for(checkpoint)
        with watchable(writer):
            return write_text(writer, start, seed, progress, texts=texts, length=length)

    tokens: Tensor | None = None
    if text_from is not None:
        with other_writer(text_from, checkpoint) as other, probed_model(as_built(other), False, device) as writer:
            tokens = written_by(writer)
        del writer  # it would live on beside the model
    with probed_model(checkpoint, low_memory, device) as model:
        text = SelfText(model, found, tokens if tokens is not None else written_by(model), names)
        try:
            yield text
        finally:
            text.close()
