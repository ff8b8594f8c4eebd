"""A linear layer whose weight stays as it is, packed or dense, and on which a few blocks are trained.

    y = x W^T + bias,   and for each block:   y[:, R] += x[:, C] V^T

W is never changed and never added to. The blocks' columns are gathered, multiplied in one batched product and added to
the rows that they belong to. Backward makes the gradients of the blocks alone, g[:, R]^T x[:, C], and that of the
input: no dense weight gradient exists (Sparse Matrix Tuning, arXiv:2405.15525, makes 0.5 % of one). Of the input only
the columns are kept that some block reads. A packed weight is decoded in forward and again in backward, not kept.
Where its scales are trained, too (`scales`), the whole input is kept.

A block that sticks out of the weight reads zeros and adds to nothing there, so its values outside stay 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from calibrationless import Blocks, Patch, dequantize, restore
from exporters import layouts
from swquant.training.scales import ScaledWeight

__all__ = ["DenseWeight", "PackedWeight", "PatchedLinear"]


@dataclass(frozen=True)
class DenseWeight:
    """A frozen [out, in] weight in memory."""

    tensor: Tensor

    def decoded(self, like: Tensor) -> Tensor:
        """[out, in] of the dtype and on the device of `like`."""
        return self.tensor.to(like)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.tensor.nbytes


@dataclass(frozen=True)
class PackedWeight:
    """A frozen weight as its file holds it: local name -> tensor of a layout of `exporters.layouts`, and the patches
    that lie under what is trained. transposed: whether it is stored [in, out]. Decoding is the loader's, so the numbers
    are."""

    parts: Mapping[str, Tensor]
    bits: int
    shape: tuple[int, int]
    patches: tuple[Patch, ...] = ()
    transposed: bool = False

    def decoded(self, like: Tensor) -> Tensor:
        """[out, in] of the dtype and on the device of `like`."""
        weight = restore(dequantize(layouts.from_tensors(self.parts, self.bits, self.shape)), *self.patches)
        return (weight.T if self.transposed else weight).to(like)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, those of the patches aside."""
        return sum(part.nbytes for part in self.parts.values())


Frozen = DenseWeight | PackedWeight | ScaledWeight


def _in_blocks(x: Tensor, side: int) -> Tensor:
    """[tokens, size] as [tokens, blocks, side], with zeros where the last block sticks out."""
    short = -x.shape[1] % side
    return (nn.functional.pad(x, (0, short)) if short else x).unflatten(1, (-1, side))


def _add(y: Tensor, added: Tensor, places: Tensor) -> Tensor:
    """y [tokens, size] with added [n, tokens, side] at the blocks `places`; in place where they do not stick out."""
    side = added.shape[2]
    short = -y.shape[1] % side
    if not short:
        y.unflatten(1, (-1, side)).index_add_(1, places, added.transpose(0, 1))
        return y
    wide = y.new_zeros(y.shape[0], y.shape[1] + short)
    wide.unflatten(1, (-1, side)).index_add_(1, places, added.transpose(0, 1))
    return y + wide[:, : y.shape[1]]


class _Product(torch.autograd.Function):
    """x [tokens, in], values [n, B, B], the weight under them, bias [out] or None, rows and columns int64 [n], the
    columns that any block reads and which of these each block reads, and the parameters of the weight under them, if it
    has any."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        frozen: Frozen,
        bias: Tensor | None,
        rows: Tensor,
        cols: Tensor,
        used: Tensor,
        place: Tensor,
        *scales: Tensor,
    ) -> Tensor:
        y = nn.functional.linear(x, frozen.decoded(x), bias)
        read = _in_blocks(x, values.shape[1]).index_select(1, used).transpose(0, 1).contiguous()  # [used, tokens, B]
        y = _add(y, torch.bmm(read[place], values.mT), rows)
        ctx.frozen = frozen
        ctx.save_for_backward(read, place, values, rows, cols, *((x,) if scales else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        read, place, values, rows, cols, *whole = ctx.saved_tensors
        of_rows = _in_blocks(g, values.shape[1]).index_select(1, rows).transpose(0, 1)  # [n, tokens, B]
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = _add(g @ ctx.frozen.decoded(g), torch.bmm(of_rows, values), cols)
        if ctx.needs_input_grad[1]:
            of_values = torch.bmm(of_rows.mT, read[place])
        of_scales = ctx.frozen.gradients(g.T @ whole[0]) if whole else ()
        return of_x, of_values, *[None] * 6, *of_scales


class PatchedLinear(nn.Module):
    """A layer with a frozen weight and trained blocks, which begin as zeros or as `blocks` says.

    frozen: the [out, in] weight; bias: [out] or None, frozen too. blocks: of a weight stored [out, in], or [in, out] if
    transposed (GPT-2's Conv1D); None where nothing but its scales is trained. `values` [n, B, B] is its only parameter
    beside those of a `ScaledWeight`, in float32 unless the blocks are float64.
    """

    rows: Tensor
    cols: Tensor
    used: Tensor
    place: Tensor

    def __init__(self, frozen: Frozen, bias: Tensor | None, blocks: Blocks | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.frozen, self.transposed = frozen, transposed
        nothing = torch.zeros(0, dtype=torch.int32)
        blocks = blocks if blocks is not None else Blocks(nothing, nothing, torch.zeros(0, 1, 1))
        if blocks.mode != "add":
            raise ValueError(f"blocks that {blocks.mode} a weight cannot be trained; those that add to it can")
        rows, cols = (blocks.cols, blocks.rows) if transposed else (blocks.rows, blocks.cols)
        values = blocks.values.mT if transposed else blocks.values
        values = values.to(torch.promote_types(values.dtype, torch.float32)).clone()
        self.values = nn.Parameter(values, requires_grad=len(rows) > 0)
        self.register_buffer("rows", rows.to(torch.int64), persistent=False)
        self.register_buffer("cols", cols.to(torch.int64), persistent=False)
        used, place = torch.unique(self.cols, return_inverse=True)  # now: on a GPU every pass would wait for its size
        self.register_buffer("used", used, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; under autocast in its dtype."""
        values = self.values
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        scales = self.frozen.parameters() if isinstance(self.frozen, nn.Module) else ()
        where = (self.rows, self.cols, self.used, self.place)
        y: Tensor = _Product.apply(flat, values.to(x.dtype), self.frozen, bias, *where, *scales)
        return y.unflatten(0, x.shape[:-1])

    @property
    def weight(self) -> Tensor:
        """[out, in] float32, blocks included, made anew: what models look at that ask a layer for its dtype or size."""
        values = self.values.detach().to(torch.float32)
        blocks = Blocks(self.rows.to(torch.int32).cpu(), self.cols.to(torch.int32).cpu(), values.cpu())
        return restore(self.frozen.decoded(values).cpu().clone(), blocks).to(values.device)

    def trained(self, dtype: torch.dtype) -> Blocks:
        """The blocks as they are now, as they are stored: oriented like the stored weight."""
        values = self.values.detach().to("cpu", dtype)
        rows, cols = self.rows.to("cpu", torch.int32), self.cols.to("cpu", torch.int32)
        if self.transposed:
            return Blocks(cols, rows, values.mT.contiguous())
        return Blocks(rows, cols, values.clone())

    def extra_repr(self) -> str:
        packed = "dense" if isinstance(self.frozen, DenseWeight) else "packed"
        return f"{len(self.values)} blocks of {self.values.shape[1]} on a {packed} weight"
