"""What training makes smaller, in nats per token: cross entropy with the text, or divergence from a teacher.

Logits are [..., vocabulary], of the positions whose next token is predicted; `counted` is bool [...], which of them
count. The divergence is computed a few rows at a time, and its gradient at once, softmax(student) - softmax(teacher):
autograd would hold three more tensors of the size of all logits, which is most of the memory of a small model's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swquant.parallel import world
from swquant.pr_moe import mixtures_of

__all__ = ["balance", "cross_entropy", "divergence"]

_ROWS = 128  # rows of logits that are worked on at a time
_BALANCE = 0.01  # of the load-balancing loss, as in DeepSpeed-MoE


def balance(model: nn.Module, share: float = 1.0) -> Tensor:
    """The load-balancing losses of all mixtures that were recorded in the last pass, weighted; 0 without one.

    share: the part of a batch's tokens that this process passed. How often an expert is chosen is then counted over the
    whole batch, so that the sum over all processes is the loss of one that passes all of it.
    """
    used = [module.used for module in mixtures_of(model).values() if module.used is not None]
    if not used:
        return torch.zeros(())
    chosen = [share * often for _, often in used]
    world().sum_(chosen)
    losses = [len(gates) * (share * gates * often).sum() for (gates, _), often in zip(used, chosen, strict=True)]
    return _BALANCE * torch.stack(losses).sum()


def cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Mean negative log-likelihood of targets int64 [...] where `counted`."""
    kept = counted.flatten()
    rows = logits.flatten(0, -2)[kept].to(torch.float32)
    return torch.nn.functional.cross_entropy(rows, targets.flatten()[kept])


def divergence(logits: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Mean KL(teacher || student) where `counted`; the gradient goes to `logits` alone."""
    result: Tensor = _Divergence.apply(logits, teacher, counted)
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        width = logits.shape[-1]
        ours, theirs, kept = logits.reshape(-1, width), teacher.reshape(-1, width), counted.reshape(-1)
        count = max(int(kept.sum()), 1)
        gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        exact = logits.dtype if logits.dtype is torch.float64 else torch.float32
        for start in range(0, len(ours), _ROWS):
            piece = slice(start, start + _ROWS)
            share = (kept[piece].to(exact) / count).unsqueeze(1)
            mine = ours[piece].to(exact).log_softmax(dim=-1)
            goal = theirs[piece].to(exact).log_softmax(dim=-1)
            likely = goal.exp()
            total += ((goal - mine).mul_(likely).sum(dim=-1, keepdim=True) * share).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[piece] = mine.exp_().sub_(likely).mul_(share).to(gradient.dtype)
        ctx.shape = logits.shape
        ctx.save_for_backward(gradient)
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).reshape(ctx.shape), None, None
