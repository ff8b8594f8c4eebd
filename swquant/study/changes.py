"""Changes to a model that can be undone: super weights scaled, other weights left out, an activation restored,
everything rounded.

A change edits the weights of the one model in memory and puts the old values back at the end. Its key names it in the
cache and makes equal wishes of different experiments one measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibrationless import (
    Block,
    Clip,
    Evidence,
    Recipe,
    SuperWeight,
    block_elements,
    dequantize,
    fit,
    follow,
    moved,
    parse_block,
    restore,
    shape_of,
)
from exporters.sidecar import OUTLIERS, PlannedPatch
from swquant.study.subject import Subject

__all__ = [
    "METHODS",
    "Change",
    "activation_restored",
    "bits_per_weight",
    "largest_pruned",
    "original",
    "rounded",
    "scaled",
]

# The paper's CLIP_z, and the share of weights that `refined` keeps exactly.
CLIP = Clip("z", 9.0)
KEPT = 0.0005
METHODS = {
    "plain": "rounded to nearest",
    "clipped": f"outliers cut at {CLIP} first",
    "restored": "super weights held out, the rest clipped, and put back",
    "refined": f"super weights held out, scales searched with one prompt, {KEPT:.2%} of the weights kept exactly",
}


@dataclass(frozen=True)
class Change:
    """apply: the changed model, as long as the context lasts. mass: also keep the mean probability of every token.

    rewritten: number of weights that `apply` computes anew. serial: windows must run one after the other.
    """

    key: str
    label: str
    apply: Callable[[Subject], AbstractContextManager[None]] = field(compare=False, repr=False)
    mass: bool = False
    rewritten: int = 0
    serial: bool = False


def original() -> Change:
    """No change."""
    return Change("original", "original", lambda _: nullcontext(), mass=True)


@contextmanager
def _super_weights_times(subject: Subject, weights: Sequence[SuperWeight], factor: float) -> Iterator[None]:
    places = [(subject.down(weight.name), weight.row, weight.col) for weight in weights]
    before = [matrix[row, col].clone() for matrix, row, col in places]
    try:
        for matrix, row, col in places:
            matrix[row, col] *= factor
        yield
    finally:
        for (matrix, row, col), value in zip(places, before, strict=True):
            matrix[row, col] = value


def scaled(factor: float, weights: Sequence[SuperWeight]) -> Change:
    """The given super weights times a factor: 0 prunes them, 1 is the original."""
    if factor == 1:
        return original()
    which = ", ".join(f"{weight.name}[{weight.row}, {weight.col}]" for weight in weights)
    label = "super weights pruned" if factor == 0 else f"super weights × {factor:g}"
    return Change(
        f"{which} times {factor!r}",
        label,
        lambda subject: _super_weights_times(subject, weights, factor),
        mass=factor == 0,
    )


def largest_pruned(count: int) -> Change:
    """The `count` largest linear weights that are no super weights set to zero."""

    @contextmanager
    def apply(subject: Subject) -> Iterator[None]:
        with _super_weights_times(subject, subject.super_weights, 0.0):  # so that they are not among the largest
            places = _largest(subject, count)
        before = [matrix[rows, cols] for matrix, rows, cols in places]
        try:
            for matrix, rows, cols in places:
                matrix[rows, cols] = 0.0
            yield
        finally:
            for (matrix, rows, cols), values in zip(places, before, strict=True):
                matrix[rows, cols] = values

    return Change(f"largest {count} pruned", f"{count:,} largest other weights pruned", apply)


def _largest(subject: Subject, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(matrix, rows, cols) of the `count` weights of largest magnitude in all matrices together."""
    matrices = list(subject.matrices())
    tops = [matrix.abs().flatten().topk(min(count, matrix.numel())) for matrix in matrices]
    values = torch.cat([top.values for top in tops])
    owners = torch.cat([torch.full_like(top.indices, index) for index, top in enumerate(tops)])
    indices = torch.cat([top.indices for top in tops])
    chosen = values.topk(min(count, len(values))).indices
    places = []
    for index in owners[chosen].unique().tolist():
        flat = indices[chosen][owners[chosen] == index]
        width = matrices[index].shape[1]
        places.append((matrices[index], flat // width, flat % width))
    return places


def activation_restored(weights: Sequence[SuperWeight]) -> Change:
    """Super weights pruned, but the super activation (one channel, one token) has the value that they would give it."""

    @contextmanager
    def apply(subject: Subject) -> Iterator[None]:
        by_module: dict[str, list[SuperWeight]] = {}
        for weight in weights:
            by_module.setdefault(subject.watch(weight.name).module, []).append(weight)
        with _super_weights_times(subject, weights, 0.0), ExitStack() as stack:
            for name, own in by_module.items():
                hook = _put_back(subject, own)
                module = subject.model.get_submodule(name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    which = ", ".join(f"{weight.name}[{weight.row}, {weight.col}]" for weight in weights)
    label = "super weights pruned, super activation restored"
    return Change(f"activation of {which} restored", label, apply, serial=True)


def _put_back(subject: Subject, weights: Sequence[SuperWeight]) -> Callable[..., Any]:
    """A forward hook. For one product more the module has its super weights and says itself what it would write."""
    places = [(subject.down(weight.name), weight) for weight in weights]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        for matrix, weight in places:
            matrix[weight.row, weight.col] = weight.value
        full = module.forward(*args, **kwargs)
        for matrix, weight in places:
            matrix[weight.row, weight.col] = 0.0
        source = full.reshape(-1, full.shape[-1])
        result = output.clone().reshape(source.shape)
        for row in {weight.row for weight in weights}:
            token = int(source[:, row].abs().argmax())
            result[token, row] = source[token, row]
        return result.view(output.shape)

    return hook


def rounded(block: str, method: str, subject: Subject) -> Change:
    """All linear weights of the decoder layers rounded in blocks (`flat:N` or `tensor`) by one of `METHODS`."""

    @contextmanager
    def apply(subject: Subject) -> Iterator[None]:
        points, energies = _points(subject), subject.energies() if method == "refined" else {}
        before = []
        try:
            for matrix in subject.matrices():
                before.append((matrix, matrix.clone()))
                place = matrix.data_ptr()
                matrix.copy_(_round(matrix, block, method, points.get(place, []), energies.get(place), subject))
            yield
        finally:
            for matrix, values in before:
                matrix.copy_(values)

    label = f"{subject.bits} bits, {block}, {method}"
    return Change(label, label, apply, rewritten=subject.weights)


def _points(subject: Subject) -> dict[int, list[tuple[int, int]]]:
    """Address of a matrix -> (row, col) of its super weights."""
    points: dict[int, list[tuple[int, int]]] = {}
    for weight in subject.super_weights:
        points.setdefault(subject.down(weight.name).data_ptr(), []).append((weight.row, weight.col))
    return points


def _scale_dtype(subject: Subject) -> torch.dtype:
    """What `compress` would store the scales as."""
    if not subject.checkpoint.stores_floats:
        return torch.bfloat16
    return next(
        stored.dtype
        for name, stored in subject.checkpoint.tensors.items()
        if name in subject.found.architecture.weights
    )


def _recipe(method: str, block: Block, points: Sequence[tuple[int, int]], weights: int, subject: Subject) -> Recipe:
    """How a matrix of so many weights is rounded by one of `METHODS`: the super weights held out, as in the paper."""
    kept = points if method in ("restored", "refined") else ()
    return Recipe(
        block=block,
        bits=subject.bits,
        clip=CLIP if method in ("clipped", "restored") else None,
        scale_dtype=_scale_dtype(subject),
        super_weights=tuple(kept),
        outliers=len(kept) + (int(KEPT * weights) if method == "refined" else 0),
        hold_out=True,
    )


def _round(
    matrix: Tensor,
    block: str,
    method: str,
    points: Sequence[tuple[int, int]],
    energy: Tensor | None,
    subject: Subject,
) -> Tensor:
    fitted = fit(parse_block(block), shape_of(matrix))
    if fitted is None:
        return matrix
    recipe = _recipe(method, fitted, points, matrix.numel(), subject)
    rounded = follow(recipe, matrix, moved(Evidence(importance=energy), matrix.device))
    return restore(dequantize(rounded.quantized, torch.float32), *rounded.patches.values())


def bits_per_weight(block: str, method: str, subject: Subject) -> float:
    """Codes, scales and weights kept exactly, per linear weight. One scale per block, however a format repeats it."""
    points = _points(subject)
    dtype = _scale_dtype(subject)
    total = 0.0
    for matrix in subject.matrices():
        shape = shape_of(matrix)
        fitted = fit(parse_block(block), shape)
        if fitted is None:
            total += 8 * dtype.itemsize * matrix.numel()
            continue
        kept = _recipe(method, fitted, points.get(matrix.data_ptr(), []), matrix.numel(), subject).outliers
        scales = matrix.numel() // block_elements(fitted, shape)
        sidecar = PlannedPatch(OUTLIERS, "", kept, shape, dtype).nbytes
        total += subject.bits * matrix.numel() + 8 * dtype.itemsize * scales + 8 * sidecar
    return total / subject.weights
