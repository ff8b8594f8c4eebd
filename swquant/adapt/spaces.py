"""What layers see, and what a set's blocks would learn: second moments of inputs, and gradients, of patched layers.

Both are those of column blocks: of the B channels that a block reads. Of a weight that has blocks in k columns of its
grid there are k, in ascending order.

Passes run where the model does. What they leave is summed there and comes back to the CPU, where sets are kept: B x B
numbers of each block, too few for a GPU to find their eigenvectors sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from calibrationless import Blocks
from calibrationless.subspaces import Hindrance, hindrance, projector, second_moment
from swquant.models.architecture import LinearWeight
from swquant.training.patched_linear import PatchedLinear

__all__ = ["columns_of", "gradients_of", "hindered", "keep_beside", "moments_of"]


def columns_of(blocks: Blocks, weight: LinearWeight) -> Tensor:
    """int64 [k], ascending: the column blocks of the input that some block reads."""
    return torch.unique((blocks.rows if weight.transposed else blocks.cols).long())


def moments_of(
    model: nn.Module,
    wanted: Mapping[str, tuple[LinearWeight, Tensor]],
    side: int,
    losses: Iterable[Callable[[], Tensor]],
) -> dict[str, Tensor]:
    """Stored name -> float64 [k, B, B], the second moments of what a layer sees in these passes. wanted: the weight,
    and which k column blocks."""
    found: dict[str, Tensor] = {}

    def watch(name: str, cols: Tensor) -> Callable[..., None]:
        def see(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).to(torch.float32)
            x = nn.functional.pad(x, (0, -x.shape[1] % side)).unflatten(1, (-1, side))
            moment = second_moment(x[:, cols.to(x.device)].transpose(0, 1))
            found[name] = found[name] + moment if name in found else moment

        return see

    with ExitStack() as stack, torch.no_grad():
        for name, (weight, cols) in wanted.items():
            module = model.get_submodule(weight.module)
            stack.callback(module.register_forward_pre_hook(watch(name, cols)).remove)
        for loss in losses:
            loss()
    nothing = {name: torch.zeros(len(cols), side, side, dtype=torch.float64) for name, (_, cols) in wanted.items()}
    return nothing | {name: moment.cpu() for name, moment in found.items()}


def gradients_of(
    layers: Mapping[str, PatchedLinear], losses: Iterable[Callable[[], Tensor]]
) -> tuple[dict[str, Tensor], float]:
    """Stored name -> gradient [n, B, B] of a layer's blocks, summed over losses, and the mean of these."""
    values = {name: layer.values for name, layer in layers.items()}
    sums = {name: torch.zeros_like(value) for name, value in values.items()}
    seen = []
    for make in losses:
        loss = make()
        for name, gradient in zip(sums, torch.autograd.grad(loss, list(values.values())), strict=True):
            sums[name] += gradient
        seen.append(float(loss.detach()))
    return {name: item.cpu() for name, item in sums.items()}, sum(seen) / len(seen)


def hindered(
    layers: Mapping[str, PatchedLinear], gradients: Mapping[str, Tensor], bases: Mapping[str, Tensor]
) -> Hindrance:
    """How much of the blocks' gradients lies in what others made their layers see. bases: [k, B, r] of every layer."""
    return hindrance((gradients[name], bases[name][_places(layer)]) for name, layer in layers.items())


def keep_beside(
    layers: Mapping[str, PatchedLinear], seen: Mapping[str, Tensor], own: Mapping[str, Tensor], soft: float
) -> tuple[dict[str, nn.Parameter], Callable[[], None]]:
    """Let layers learn only beside what the older tasks of their set saw, and `soft` of it beside what the base's own
    text shows.

    Returns what is to be trained instead of the layers' values, and what brings these up to date: values = start +
    (trained - start) P for every block, whatever an optimizer does. Projected gradients alone would not do: AdamW
    scales every number of a gradient by its own history, which turns a step back into what it was projected off.
    """
    trained, moved = {}, []
    for name, layer in layers.items():
        allowed = projector(seen[name].double())
        if soft:
            allowed = projector(own[name].double(), soft) @ allowed
        of_block = allowed[_places(layer)].to(layer.values)
        trained[name] = nn.Parameter(layer.values.detach().clone())
        layer.values.register_hook(_handing_on(trained[name], of_block))
        moved.append((layer.values, layer.values.detach().clone(), trained[name], of_block))

    def settle() -> None:
        with torch.no_grad():
            for values, start, free, of_block in moved:
                values.copy_(start + (free - start) @ of_block)
                values.grad = None

    return trained, settle


def _handing_on(trained: nn.Parameter, of_block: Tensor) -> Callable[[Tensor], None]:
    """The gradient of values becomes that of what is trained."""

    def hand_on(gradient: Tensor) -> None:
        own = gradient @ of_block.mT
        trained.grad = own if trained.grad is None else trained.grad + own

    return hand_on


def _places(layer: PatchedLinear) -> Tensor:
    """int64 [n]: which of the column blocks each block reads."""
    return layer.place.cpu()
