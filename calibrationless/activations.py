"""INT8 activations: round the input of a linear layer, a few massive channels aside.

    A_hat = RESTORE(Q^-1(Q(REPLACE(A))))

One scale serves a whole token, or a whole tensor, and the largest magnitude sets it. A super activation of 3,000 among
values of 1 leaves those no more than a level or two. So what is massive is replaced by something harmless before the
scale is chosen, and put back, exactly, after rounding. The paper replaces one scalar of each tensor, found anew every
time. Here it is a fixed set of channels of each linear, found on the one prompt: a super activation keeps its channel,
whatever the text, so the set needs no search at run time, and a product costs
`A[:, channels] @ W[:, channels].T` in float.

    scale   largest |A| that is not kept / 127      per token [..., 1], per tensor [], or static: twice the prompt's
    round   codes = clamp(round(A / scale), -127, 127)

REPLACE takes the median in the paper. The scale of a symmetric rounding asks for the largest magnitude only, which no
median of the rest can exceed, so zero gives the same codes without sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "activation_codes", "activation_scale", "massive_channels", "round_activations", "static_scale"]

LEVELS = 127  # -127 .. 127: -128 has no mirror image, and integer kernels do without it
# A channel is massive if the most it holds on the prompt is so many times what the median channel holds; of each linear
# the largest are kept, no more than so many.
MASSIVE, MOST = 8.0, 4
# Ten tokens do not show the largest activation that a text will bring; beyond a static scale it is clamped.
HEADROOM = 2.0


def massive_channels(peaks: Tensor) -> Tensor:
    """int32 [k], ascending, of peaks [in], the largest |x| of every channel: those that would stretch the scale.

    k is 0 where no channel stands out, and 4 at most.
    """
    values, channels = peaks.topk(min(MOST, len(peaks)))
    return channels[values > MASSIVE * peaks.median()].sort().values.to(torch.int32)


def static_scale(peaks: Tensor, channels: Tensor) -> float:
    """The scale for twice what the prompt showed: peaks float [in]; channels int [k] are kept and do not count."""
    rest = peaks.to(torch.float32).index_fill(0, channels.to(torch.int64), 0)
    return float(_scale_of(HEADROOM * rest.amax()))


def _scale_of(largest: Tensor) -> Tensor:
    """Zeros get scale 1, so that nothing is divided by zero and they stay zeros."""
    return torch.where(largest > 0, largest / LEVELS, torch.ones_like(largest))


def activation_scale(activations: Tensor, keep: Tensor | None = None, *, per_token: bool) -> Tensor:
    """float32 scale of activations [..., channels]: [..., 1] per token, [] per tensor.

    keep: bool, broadcast over activations: what REPLACE takes out.
    """
    magnitudes = activations.detach().to(torch.float32).abs()
    if keep is not None:
        magnitudes = magnitudes.masked_fill(keep, 0)
    return _scale_of(magnitudes.amax(dim=-1, keepdim=True) if per_token else magnitudes.amax())


def activation_codes(activations: Tensor, scale: Tensor | float) -> Tensor:
    """int8 codes, shaped like activations; ties go to the even code. What lies beyond a static scale is clamped."""
    return torch.round(activations.detach().to(torch.float32) / scale).clamp_(-LEVELS, LEVELS).to(torch.int8)


def round_activations(
    activations: Tensor, keep: Tensor | None = None, *, per_token: bool, scale: Tensor | float | None = None
) -> Tensor:
    """What an integer product sees of activations [..., channels], in their dtype; `keep` is as it was.

    keep: bool, broadcast over activations. scale: a static one; otherwise it is chosen anew, for every token or for
    the tensor. A NaN or infinite activation stays one: it is never rounded to something that looks sound.
    """
    if activations.numel() == 0:
        return activations
    if scale is None:
        scale = activation_scale(activations, keep, per_token=per_token)
    values = activations.to(torch.float32)
    rounded = torch.round(values / scale).clamp(-LEVELS, LEVELS) * scale
    rounded = torch.where(torch.isfinite(values), rounded, values).to(activations.dtype)
    return rounded if keep is None else torch.where(keep, activations, rounded)
