"""Stages: how long the teacher takes part. The loss is L + alpha * T^2 * KL(teacher || student), both at temperature T.

Distillation helps at first and hurts towards the end (DeepSpeed-MoE, arXiv:2201.05596, Figure 4a), so the teacher
goes after a share of the steps, or when the student learns faster without it: at a few steps both ways are tried for
a little while from where the student is, and held-out cross entropy decides. What was tried is put back and written
down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swquant.training.loop import Schedule, train

__all__ = ["Stages"]

# At which shares of the steps both ways are tried, and for what share.
_LOOKS = (0.2, 0.4, 0.6, 0.8)
_AHEAD = 0.05
# By how much held-out cross entropy has to be better without the teacher: less is noise.
_BETTER = 1e-3


@dataclass
class Stages:
    """steps: of the whole training. until: the step from which the teacher is gone, None to find out. facts: what was
    found out (`until`, `looks`), kept with the state of an interrupted run.

    loss_of: (step, with the teacher) -> loss. held_out: cross entropy of held-out text, in nats.
    """

    steps: int
    rate: float
    until: int | None
    parameters: Mapping[str, nn.Parameter]
    loss_of: Callable[[int, bool], Tensor]
    held_out: Callable[[], float]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts.setdefault("looks", [])
        if self.until is not None:
            self.facts["until"] = self.until

    def loss(self, step: int, part: int) -> Tensor:
        """The loss of a step, for `training.loop.train`."""
        return self.loss_of(step, self._taught(step))

    def _taught(self, step: int) -> bool:
        """Whether the teacher takes part in a step."""
        looks = self.facts["looks"]
        due = step in {round(share * self.steps) for share in _LOOKS}
        if self.until is None and "until" not in self.facts and due and step not in [look["step"] for look in looks]:
            taught, alone = (self._ahead(step, teacher) for teacher in (True, False))
            looks.append({"step": step, "taught": taught, "alone": alone})
            if alone < taught * (1 - _BETTER):
                self.facts["until"] = step
        return bool(step < self.facts.get("until", self.steps))

    def _ahead(self, step: int, teacher: bool) -> float:
        """Held-out cross entropy a little later, with or without the teacher. The parameters are put back."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        count = max(1, round(_AHEAD * self.steps))
        rate = self.rate * (1 - step / self.steps)
        train(self.parameters, lambda later, _: self.loss_of(step + later, teacher), Schedule(count, rate))
        loss = self.held_out()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(before[name])
        return loss
