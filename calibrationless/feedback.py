"""Error feedback: what rounding one column gets wrong, the columns after it make up for (GPTQ, arXiv:2210.17323).

Rounding to the nearest is best for each weight alone. The output of a layer is a sum, though, and where two input
channels move together, an error in the first can be cancelled by a change of the second. The Gram matrix of the inputs,
G = X^T X, says how they move together. Column after column is rounded, and its error spread over those not yet rounded,

    w[rest] -= (w[j] - rounded) / U[j, j] * U[j, rest]        with  U^T U = inverse(G + damping)

Scales are not fed back: they are searched beforehand with the diagonal of G as importance, and stay. Columns that
matter go first, when there is most left to make up for their errors; each keeps the scale of its own block, so the
stored codes look like any others. Outliers are chosen beforehand, too, and count as exact.

G comes from few tokens here (some thousands that the model wrote itself). Damping keeps what is noise off the diagonal
from being believed: at 4,096 tokens it is as strong as the diagonal itself, and falls as there are more. With the usual
hundredth of the mean, the result is worse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calibrationless.blocks import expand
from calibrationless.patches import Patch, covered
from calibrationless.pieces import for_pieces
from calibrationless.quantized import QuantizedTensor

__all__ = ["Factor", "damping_for", "feed_back", "inverse_factor", "inverse_factor_"]

# (order int64 [in], U float32 [in, in] upper triangular).
Factor = tuple[Tensor, Tensor]

_LAZY = 128  # columns whose feedback is collected before it goes to the rest, as one product
_OF_MEAN = 0.01


def damping_for(tokens: int) -> float:
    """How much of the diagonal to add to a Gram matrix of so many tokens. Tried on two models at 4,096 to 16,384."""
    return float((4096 / tokens) ** 1.5)


def inverse_factor(gram: Tensor, damping: float = 1.0) -> Factor:
    """(order int64 [in], U float32 [in, in] upper triangular) of a Gram matrix [in, in], columns in that order.

    The order is by falling diagonal. damping: the share of the diagonal that is added to it. Raises ValueError where
    the matrix is not finite.
    """
    return inverse_factor_(gram.to(torch.float32, copy=True), damping)


def inverse_factor_(gram: Tensor, damping: float = 1.0) -> Factor:
    """The same in the memory of `gram`, float32 and contiguous, which is lost: the matrix of 14,336 inputs takes
    822 MB, and LAPACK needs no second one."""
    if not all(bool(torch.isfinite(gram[strip]).all()) for strip in _strips(len(gram))):
        raise ValueError("the Gram matrix of the inputs is not finite")
    diagonal = gram.diagonal().clone()
    order = diagonal.argsort(descending=True, stable=True)
    _sort(gram, order)
    mean = float(diagonal.mean()) or 1.0
    gram.diagonal().add_(damping * diagonal[order] + _OF_MEAN * mean)
    by_columns = gram.div_(mean).mT  # as LAPACK wants it: no copy
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    _cholesky(by_columns, info, upper=False)
    torch.cholesky_inverse(by_columns, out=by_columns)
    _cholesky(by_columns, info, upper=True)
    return order, by_columns


def _sort(gram: Tensor, order: Tensor) -> None:
    """Rows and columns of a symmetric matrix in another order, in place. Sums may differ in the last bit on the two
    sides of the diagonal: the lower one is taken."""
    strips = _strips(len(order))
    for strip in strips:
        gram[strip] = gram[strip][:, order]
    for strip in strips:
        gram[:, strip] = gram[:, strip][order]
    for strip in strips:
        gram[strip, strip.start :] = gram[strip.start :, strip].T.clone()


def _strips(size: int) -> list[slice]:
    return [slice(start, start + _LAZY) for start in range(0, size, _LAZY)]


def _cholesky(matrix: Tensor, info: Tensor, *, upper: bool) -> None:
    torch.linalg.cholesky_ex(matrix, upper=upper, check_errors=True, out=(matrix, info))


def feed_back(weight: Tensor, quantized: QuantizedTensor, factor: Factor | None, *kept: Patch) -> QuantizedTensor:
    """`quantized` with other codes: rounded column by column, with feedback. Scales, zero points and offsets stay.

    weight: [out, in]; factor: from `inverse_factor`, None for the nearest code of every weight by itself; kept: patches
    that the loader lays over the codes. Rows do not depend on each other, and results not on the number of threads.
    """
    order, upper = factor if factor is not None else (torch.arange(quantized.shape[1], device=weight.device), None)
    scale = expand(quantized.scale.to(torch.float32), quantized.block, quantized.shape)
    middle = float(1 << (quantized.bits - 1))
    zero = None
    if quantized.zero_point is not None:
        zero = expand(quantized.zero_point, quantized.block, quantized.shape)
    if quantized.offset is not None:  # a zero point between two codes
        zero = expand(-quantized.offset.to(torch.float32), quantized.block, quantized.shape) / scale
    held = covered(kept, quantized.shape)
    exact = torch.zeros(quantized.shape, dtype=torch.bool, device=weight.device) if held is None else held
    codes = quantized.codes.clone()
    top = float((1 << quantized.bits) - 1)

    def cut(values: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        steps_away = torch.div(values, steps)
        moved = steps_away.add_(zeros).round_() if quantized.offset is not None else steps_away.round_().add_(zeros)
        return moved.clamp_(0, top)

    def work(piece: slice) -> None:
        w = weight[piece].to(torch.float32)[:, order].T.contiguous()  # [in, rows]: a column is a row here
        original, is_exact = w.clone(), exact[piece][:, order].T
        steps = scale[piece][:, order].T.contiguous()
        zeros = torch.full_like(steps, middle) if zero is None else zero[piece][:, order].T.to(torch.float32)
        if upper is None:
            found = cut(original, steps, zeros)
            codes[piece] = found.T.to(torch.int16).to(torch.uint8)
            return
        found = torch.empty_like(w)
        errors = torch.empty(_LAZY, w.shape[1], device=w.device)
        for start in range(0, len(order), _LAZY):
            stop = min(start + _LAZY, len(order))
            for j in range(start, stop):
                code = cut(w[j], steps[j], zeros[j])
                found[j] = code
                value = torch.where(is_exact[j], original[j], (code - zeros[j]) * steps[j])
                error = (w[j] - value) / upper[j, j]
                errors[j - start] = error
                if j + 1 < stop:
                    w[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            if stop < len(order):
                w[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
        # An outlier's own code is that of its own value, for loaders that do not restore it.
        found = torch.where(is_exact, cut(original, steps, zeros), found)
        codes[piece] = codes[piece].index_copy(1, order, found.T.to(torch.int16).to(torch.uint8))

    for_pieces(work, *quantized.shape, device=weight.device)
    return replace(quantized, codes=codes)
