"""Which norms can take over a scaling of the weights that read them, proved on the prompt.

The probe says which norm every linear weight reads. Whether something else reads it, too (a router, a second branch),
and how the norm applies its gain (Gemma's is 1 + weight) is not looked up but tried: the prompt runs once more with the
scaled norms and weights, and since powers of two round nothing, the logits must not change. A kind of norm that changes
them is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibrationless import Probe, scaling_exponents
from swquant.checkpoints.base import Checkpoint
from swquant.models.architecture import Architecture

__all__ = ["Fold", "find_folds", "fold_columns", "fold_gain"]

_UNCHANGED = 1e-5  # of the range of the logits


@dataclass(frozen=True)
class Fold:
    """A norm and the weights that read it.

    gain, bias: the norm's stored tensors (bias "" if it has none). offset: what the norm adds to the stored gain
    (Gemma: 1).
    readers: stored names of the linear weights. exponents: int8 [channels].
    """

    norm: str
    gain: str
    bias: str
    offset: float
    readers: tuple[str, ...]
    exponents: Tensor


def fold_columns(weight: Tensor, fold: Fold) -> Tensor:
    """A reader's [out, in] weight with its columns scaled."""
    return torch.ldexp(weight, fold.exponents.to(torch.int32))


def fold_gain(gain: Tensor, fold: Fold, *, is_bias: bool = False) -> Tensor:
    """The norm's stored gain or bias after scaling, float32 [channels]."""
    offset = 0.0 if is_bias else fold.offset
    return torch.ldexp(gain.to(torch.float32) + offset, -fold.exponents.to(torch.int32)) - offset


def find_folds(
    checkpoint: Checkpoint,
    architecture: Architecture,
    probe: Probe,
    run: Callable[[Mapping[str, Tensor]], Tensor],
) -> tuple[Fold, ...]:
    """All folds that leave the logits as they are. run: logits of the prompt with norms scaled by name."""
    readers: dict[str, list[str]] = {}
    for weight in architecture.weights.values():
        record = probe.linears.get(weight.watch)
        if record is not None and record.norm:
            readers.setdefault(record.norm, []).append(weight.name)
    folds = [
        fold
        for norm, names in readers.items()
        if (fold := _fold(norm, tuple(names), checkpoint, architecture, probe)) is not None
    ]
    if not folds or _unchanged(folds, probe.logits, run):
        return tuple(folds)
    roles: dict[str, list[Fold]] = {}
    for fold in folds:
        roles.setdefault(fold.norm.rpartition(".")[2], []).append(fold)
    return tuple(fold for members in roles.values() if _unchanged(members, probe.logits, run) for fold in members)


def _fold(
    norm: str, readers: tuple[str, ...], checkpoint: Checkpoint, architecture: Architecture, probe: Probe
) -> Fold | None:
    gain = architecture.vectors.get(f"{norm}.weight")
    if gain is None:
        return None
    bias = architecture.vectors.get(f"{norm}.bias", "")
    output = probe.norms[norm].to(torch.float32)
    output = output.reshape(-1, output.shape[-1])
    if bias:
        output = output - checkpoint.read(bias).to(torch.float32)
    stored = checkpoint.read(gain).to(torch.float32)
    offset = next((offset for offset in (0.0, 1.0) if _normalized(output, stored + offset)), None)
    if offset is None:
        return None
    energy = probe.linears[architecture.weights[readers[0]].watch].energy
    return Fold(norm, gain, bias, offset, readers, scaling_exponents(energy))


def _normalized(output: Tensor, gain: Tensor) -> bool:
    """Whether [tokens, channels] outputs have a mean square of 1 in every token once the gain is taken out."""
    if output.shape[1] != gain.shape[0] or bool((gain == 0).any()):
        return False
    squares = (output / gain).square().mean(dim=1)
    return bool(((squares - 1).abs() < 0.01).all())


def _unchanged(folds: Sequence[Fold], logits: Tensor, run: Callable[[Mapping[str, Tensor]], Tensor]) -> bool:
    scaled = run({fold.norm: torch.exp2(fold.exponents.to(torch.float32)) for fold in folds})
    largest = float((scaled - logits).abs().max())
    return largest <= _UNCHANGED * float(logits.max() - logits.min())
