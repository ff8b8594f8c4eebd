"""Super weights planted as the published directory lists them: several rows, columns, layers, tokens, in any family.

Nothing here knows a family. The module that a down projection reads is found by its shape and place, a norm behind the
MLP by what it is given. A neuron is made to fire on what the chosen tokens bring into the MLP (its rows of the gate and
up projections point there), and single weights of the down projection behind it are made large. Layers are planted
first to last, because an early super activation changes what a later MLP reads. Nothing else is touched.

What was planted is then tried, without detection: left out alone, every weight must change what its channel holds, and
for a while. A later planting may undo an earlier one (a model that normalizes the residual stream itself makes room
for one layer's super weights only); such a model is none to measure with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibrationless import LinearRecord
from calibrationless.probe import is_norm
from swquant.detect.pipeline import run_text, watchable
from swquant.models.architecture import Architecture, LinearKind, LinearWeight

FIRES = 50.0  # a planted input or output stands out from its token at least so much
NEURON, VALUE, GAIN = 4.0, 60.0, 60.0
# Left out alone, a weight changes its channel by so much of the most that this ever holds, in all of so many of the
# layers from its own on.
MATTERS, LASTS = 0.2, 0.5
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)


class CannotPlantError(Exception):
    """The layer has no MLP of a kind that is known here, its neuron does not fire, or the weight does not matter."""


@dataclass(frozen=True)
class Spot:
    """Super weights of one layer: every row with every column, all firing on `tokens`."""

    layer: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    tokens: tuple[int, ...] = (0,)
    neuron: float = NEURON
    value: float = VALUE

    @property
    def places(self) -> set[tuple[int, int, int]]:
        return {(self.layer, row, col) for row in self.rows for col in self.cols}


def plant_spots(
    model: PreTrainedModel, architecture: Architecture, spots: Sequence[Spot], prompt: Tensor
) -> set[tuple[int, int, int]]:
    """Plant all spots; returns their (layer, row, col). prompt: int64 [1, tokens].

    Raises CannotPlantError where a layer's MLP is of an unknown kind, its neuron cannot be made to fire, or a weight
    turns out not to matter.
    """
    with watchable(model), torch.no_grad():
        spots = sorted(spots, key=lambda spot: spot.layer)
        planted = [_plant(model, architecture, spot, prompt) for spot in spots]
        states = _states(model, architecture, prompt)
        for spot, weight in zip(spots, planted, strict=True):
            for row in spot.rows:
                for col in spot.cols:
                    value, weight[row, col] = float(weight[row, col]), 0.0
                    without = _states(model, architecture, prompt)
                    weight[row, col] = value
                    if not _matters(states, without, spot.layer, row):
                        raise CannotPlantError(f"layer {spot.layer} [{row}, {col}] does not matter")
    return set().union(*(spot.places for spot in spots))


def _states(model: PreTrainedModel, architecture: Architecture, prompt: Tensor) -> Tensor:
    """What every layer hands on, [layers, tokens, hidden]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        output = output[0] if isinstance(output, tuple | list) else output
        assert isinstance(output, Tensor)
        seen.append(output.detach().reshape(-1, output.shape[-1]).clone())

    with ExitStack() as stack:
        for name in architecture.layers:
            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        model(input_ids=prompt, use_cache=False)
    return torch.stack(seen)


def _matters(states: Tensor, without: Tensor, layer: int, row: int) -> bool:
    before, after = states[layer:, :, row], without[layer:, :, row]
    changed = (before - after).abs().amax(dim=1) >= MATTERS * before.abs().max()
    return bool(changed[: math.ceil(LASTS * len(changed))].all())


def _plant(model: PreTrainedModel, architecture: Architecture, spot: Spot, prompt: Tensor) -> Tensor:
    """The weight [out, in] that they were planted in, a view."""
    downs = [weight for weight in architecture.weights.values() if weight.down and weight.layer == spot.layer]
    for down in downs:
        parameter = model.get_submodule(down.module).get_parameter(down.parameter)
        experts = range(parameter.shape[0]) if down.kind is LinearKind.FUSED else (down.expert,)
        for expert in experts:
            with _undone_unless_kept(model) as keep:
                weight = _plant_in(model, architecture, down, expert, spot, prompt)
                if weight is not None:
                    keep()
                    return weight
    raise CannotPlantError(f"layer {spot.layer}")


def _plant_in(
    model: PreTrainedModel,
    architecture: Architecture,
    down: LinearWeight,
    expert: int | None,
    spot: Spot,
    prompt: Tensor,
) -> Tensor | None:
    """The weight of this down projection, planted; None if that did not work, then it may be half planted."""
    hidden = model.config.get_text_config().hidden_size
    weight = _matrix(model, down.module, down.parameter, expert, rows=hidden)
    if weight is None or max(spot.cols) >= weight.shape[1]:
        return None
    feeders = _feeders(model, architecture, down, expert, hidden, weight.shape[1])
    if not feeders:
        return None
    reads = feeders[0][0]
    inputs = _inputs(model, reads, prompt)[list(spot.tokens)]
    direction = spot.neuron * (inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1e-6)).sum(dim=0)
    watch = f"{down.name}[{expert}]" if down.kind is LinearKind.FUSED else down.watch
    for sign in (1.0, -1.0):
        for module, matrix in feeders:
            for row in _rows_of(model.get_submodule(module), matrix, spot.cols, weight.shape[1]):
                matrix[row] = sign * direction
        for row in spot.rows:
            for index, col in enumerate(spot.cols):
                weight[row, col] = spot.value * (1 - 0.2 * index)
        for norm in _norms_behind(model, architecture.layers[spot.layer], down.module, prompt):
            norm.weight[list(spot.rows)] = GAIN
        record = run_text(model, architecture, prompt, record=True).linears.get(watch)
        if record is not None and _fires(record, spot):
            return weight
    return None


def _fires(record: LinearRecord, spot: Spot) -> bool:
    return (
        record.input.channel in spot.cols
        and record.output.channel in spot.rows
        and min(record.input.ratio, record.output.ratio) >= FIRES
    )


def _matrix(model: PreTrainedModel, module: str, parameter: str, expert: int | None, *, rows: int) -> Tensor | None:
    """A parameter, or one expert's slice, as a view [rows, …]; None if no dimension is `rows`."""
    owner = model.get_submodule(module)
    weight = owner.get_parameter(parameter).detach()
    weight = weight if expert is None else weight[expert]
    if weight.ndim != 2:
        return None
    if isinstance(owner, Conv1D) or getattr(owner, "is_transposed", False) or weight.shape[0] != rows:
        weight = weight.T
    return weight if weight.shape[0] == rows else None


def _feeders(
    model: PreTrainedModel, architecture: Architecture, down: LinearWeight, expert: int | None, hidden: int, inner: int
) -> list[tuple[str, Tensor]]:
    """(module, view [inner or 2 * inner, hidden]) of what computes the input of a down projection."""
    if expert is not None:
        owner = model.get_submodule(down.module)
        parameters = [
            (down.module, name) for name, _ in owner.named_parameters(recurse=False) if name != down.parameter
        ]
    else:
        layer = architecture.layers[down.layer]
        plain = [
            weight.module
            for weight in architecture.weights.values()
            if weight.layer == down.layer
            and weight.expert is None
            and weight.kind is not LinearKind.FUSED
            and weight.module != down.module
            and not _ATTENTION.search(weight.module.removeprefix(layer))
        ]
        parent = down.module.rpartition(".")[0]
        beside = [module for module in plain if module.rpartition(".")[0] == parent]
        parameters = [(module, "weight") for module in beside or plain]
    found = []
    for module, parameter in parameters:
        for rows in (inner, 2 * inner):
            matrix = (
                _matrix(model, module, parameter, expert, rows=rows)
                if model.get_submodule(module).get_parameter(parameter).ndim == (2 if expert is None else 3)
                else None
            )
            if matrix is not None and matrix.shape[1] == hidden:
                found.append((module, matrix))
                break
    return found


def _rows_of(module: nn.Module, matrix: Tensor, cols: Sequence[int], inner: int) -> list[int]:
    """The rows of a feeder that make the columns `cols` of the input of the down projection."""
    if matrix.shape[0] == inner:
        return list(cols)
    if getattr(module, "is_concatenated", True):
        return [row for col in cols for row in (col, col + inner)]
    return [row for col in cols for row in (2 * col, 2 * col + 1)]  # gpt_oss: gate and up interleaved


def _inputs(model: PreTrainedModel, module: str, prompt: Tensor) -> Tensor:
    """What enters a module on the prompt, float32 [tokens, hidden]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        model(input_ids=prompt, use_cache=False)
    finally:
        hook.remove()
    if not seen:
        raise CannotPlantError(f"{module} is not called")
    inputs = seen[0].reshape(-1, seen[0].shape[-1]).to(torch.float32)
    if inputs.shape[0] < prompt.shape[1]:
        raise CannotPlantError(f"{module} reads {inputs.shape[0]} tokens")
    return inputs


def _norms_behind(model: PreTrainedModel, layer: str, down: str, prompt: Tensor) -> list[nn.Module]:
    """Norms of the layer that read the MLP's result itself: they would undo a spike, unless their gain makes it."""
    results: list[Tensor] = []
    norms: list[nn.Module] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor):
            results.append(output)

    def compare(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and any(args[0].data_ptr() == result.data_ptr() for result in results):
            norms.append(module)

    local = down.removeprefix(layer + ".").split(".")
    ancestors = [f"{layer}.{'.'.join(local[:depth])}" for depth in range(1, len(local) + 1)]
    with ExitStack() as stack:
        for name in ancestors:
            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        for module in model.get_submodule(layer).modules():
            if is_norm(module):
                stack.callback(module.register_forward_pre_hook(compare).remove)
        model(input_ids=prompt, use_cache=False)
    return norms


@contextmanager
def _undone_unless_kept(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Puts every weight of the model back, unless what is yielded is called."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept: list[bool] = []
    yield lambda: kept.append(True)
    if not kept:
        for name, parameter in model.named_parameters():
            parameter.detach().copy_(before[name])
