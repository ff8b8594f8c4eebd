"""The scales of a rounded weight as parameters, and its offsets where it has any: training that costs no byte.

    scale  = scale0 exp(steps)                      steps [like the scale], 0 at first
    offset = offset0 + |scale0| 2^(bits-1) shifts   shifts, too; what a step of either moves a weight by is about alike

The codes stay. Forward decodes with scales rounded to the dtype that they are stored in, as every loader will, so what
is trained is what is stored; backward passes that rounding by (a straight-through estimate). The gradient of a scale is
the sum of its block's weight gradients times their codes. So a weight gradient exists for a moment, of one layer at a
time; what patches hold exactly has no part in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from calibrationless import Patch, QuantizedTensor, covered, dequantize, expand, moved, restore, to_blocks

__all__ = ["ScaledWeight"]


class ScaledWeight(nn.Module):
    """A rounded weight whose scales are trained; its codes take a byte each in memory, since every pass decodes them
    and every step goes back to them. patches: that lie under what is trained. transposed: whether it is stored [in,
    out]. steps, shifts: its parameters; shifts is None for a weight without offsets."""

    shifts: nn.Parameter | None

    def __init__(self, stored: QuantizedTensor, patches: tuple[Patch, ...] = (), transposed: bool = False) -> None:
        super().__init__()
        self._stored, self._patches, self._transposed = stored, patches, transposed
        self.steps = nn.Parameter(torch.zeros_like(stored.scale, dtype=torch.float32))
        self.shifts = None if stored.offset is None else nn.Parameter(torch.zeros_like(self.steps))

    def on(self, device: torch.device) -> ScaledWeight:
        """The same with all of it on a device."""
        return ScaledWeight(moved(self._stored, device), moved(self._patches, device), self._transposed)

    @property
    def trained(self) -> QuantizedTensor:
        """The weight as it is now, scales and offsets of the dtype that they are stored in."""
        stored = self._stored
        scale, offset = stored.scale.to(torch.float32), stored.offset
        if offset is not None and self.shifts is not None:
            shifted = offset.to(torch.float32) + self._reach(scale) * self.shifts.detach()
            offset = shifted.to(offset.dtype)
        return replace(stored, scale=(scale * self.steps.detach().exp()).to(stored.scale.dtype), offset=offset)

    def _reach(self, scale: Tensor) -> Tensor:
        """What an offset moves by where its shift grows by 1: half of what the codes of its block span."""
        return scale.abs() * (1 << (self._stored.bits - 1))

    def decoded(self, like: Tensor) -> Tensor:
        """[out, in] of the dtype and on the device of `like`."""
        weight = restore(dequantize(self.trained), *self._patches)
        return (weight.T if self._transposed else weight).to(like)

    def gradients(self, of_weight: Tensor) -> tuple[Tensor, ...]:
        """Of the parameters, in their order, from that of the weight [out, in]."""
        now = self.trained
        of_weight = (of_weight.T if self._transposed else of_weight).to(torch.float32)
        held = covered(self._patches, now.shape)
        if held is not None:
            of_weight = of_weight.masked_fill(held, 0.0)
        codes = now.codes.to(torch.float32)
        if now.zero_point is not None:
            codes -= expand(now.zero_point, now.block, now.shape)
        elif now.offset is None:
            codes -= 1 << (now.bits - 1)
        scale = now.scale.to(torch.float32)

        def summed(gradient: Tensor) -> Tensor:
            return to_blocks(gradient, now.block).sum(dim=1).view(scale.shape)

        of_steps = summed(codes.mul_(of_weight)).mul_(scale)
        if self.shifts is None:
            return (of_steps,)
        return of_steps, summed(of_weight).mul_(self._reach(self._stored.scale.to(torch.float32)))

    def extra_repr(self) -> str:
        return f"{self.steps.numel()} scales{'' if self.shifts is None else ' and offsets'} of a rounded weight"
