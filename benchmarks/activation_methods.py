"""The ways of rounding activations that `activations.py` compares, all on the quantizers of calibrationless.

    naive          REPLACE nothing
    one scalar     the paper: the largest magnitude of each tensor is replaced and restored
    4 per token    the four largest of each token
    4 channels     swquant: up to four fixed channels of each linear, those that `massive_channels` finds on one prompt
    SmoothQuant    Xiao et al. 2023: inputs divided, columns of the weight multiplied by
                   s = max|X|^0.5 / max|W|^0.5, for the linears that read a norm, as in its implementation for llama;
                   max|X| from a calibration text, max|W| over all that read the same norm

Each is a mask of what is kept, or a scale of channels; what is not kept is rounded, one scale per tensor or token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibrationless import Channel, Group, dequantize, fit, massive_channels, quantize, round_activations, shape_of

__all__ = ["METHODS", "Method", "Rounder", "round_weights", "smoothing"]

_ALPHA = 0.5
# A module and its input [..., channels] -> what is kept, bool, or None.
Keep = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Method:
    """keep: see above, made from the prompt's peaks. smooth: whether channels are scaled. text: what it read."""

    name: str
    keep: Callable[[Mapping[str, Tensor]], Keep]
    smooth: bool = False
    text: str = "none"


def _nothing(peaks: Mapping[str, Tensor]) -> Keep:
    return lambda name, x: None


def _largest_scalar(peaks: Mapping[str, Tensor]) -> Keep:
    def keep(name: str, x: Tensor) -> Tensor:
        magnitudes = x.abs()
        return magnitudes == magnitudes.amax()

    return keep


def _largest_of_token(peaks: Mapping[str, Tensor]) -> Keep:
    def keep(name: str, x: Tensor) -> Tensor:
        places = x.abs().topk(4, dim=-1).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, places, True)

    return keep


def _fixed_channels(peaks: Mapping[str, Tensor]) -> Keep:
    masks = {}
    for name, peak in peaks.items():
        masks[name] = torch.zeros(len(peak), dtype=torch.bool)
        masks[name][massive_channels(peak).to(torch.int64)] = True
    return lambda name, x: masks[name]


METHODS = (
    Method("naive", _nothing),
    Method("SmoothQuant", _nothing, smooth=True, text="calibration"),
    Method("4 channels (swquant)", _fixed_channels, text="one prompt"),
    Method("one scalar per tensor (paper)", _largest_scalar),
    Method("4 largest per token", _largest_of_token),
)


class Rounder:
    """Rounds the inputs of all linears of a model while `active`; scales of channels are divided out first."""

    def __init__(self, model: nn.Module, names: Mapping[str, object]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._keep: Keep | None = None
        self._per_token = False
        self._scales: Mapping[str, Tensor] = {}

    @contextmanager
    def active(
        self, keep: Keep | None, *, per_token: bool, scales: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """keep: None rounds nothing and only divides by the scales."""
        self._keep, self._per_token, self._scales = keep, per_token, scales or {}
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] / self._scales[name] if name in self._scales else args[0]
            if self._keep is not None:
                x = round_activations(x, self._keep(name, x), per_token=self._per_token)
            return (x, *args[1:])

        return rounded


def smoothing(
    weights: Mapping[str, Tensor], peaks: Mapping[str, Tensor], norms: Mapping[str, str]
) -> dict[str, Tensor]:
    """Module -> SmoothQuant's s [in], for modules that read a norm. peaks: max|X| [in] on the calibration text."""
    groups: dict[str, list[str]] = {}
    for name, norm in norms.items():
        if norm:
            groups.setdefault(norm, []).append(name)
    scales = {}
    for names in groups.values():
        columns = torch.stack([weights[name].abs().amax(dim=0) for name in names]).amax(dim=0).clamp(min=1e-5)
        scale = (peaks[names[0]].clamp(min=1e-5) ** _ALPHA / columns ** (1 - _ALPHA)).clamp(min=1e-5)
        scales |= dict.fromkeys(names, scale)
    return scales


def round_weights(
    weights: Mapping[str, Tensor], bits: int, energies: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """8 bits: one scale per row, to nearest. 4 bits: blocks of 128 or less, scales searched with the prompt's energy.
    scales: of channels, multiplied in before."""
    rounded = {}
    for name, weight in weights.items():
        scale = scales.get(name)
        held = weight if scale is None else weight * scale
        block = Channel() if bits == 8 else fit(Group(128), shape_of(weight))
        assert block is not None
        energy = energies[name] if scale is None else energies[name] / scale.square()
        rounded[name] = dequantize(quantize(held, block, bits, importance=None if bits == 8 else energy))
    return rounded
