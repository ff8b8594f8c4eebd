"""The types of the manifest's `pool`, as those of `schema`: what `swquant adapt` says of sets, tasks and decisions."""

# No `from __future__ import annotations`, as in `schema`.
from typing import Literal

from typing_extensions import TypedDict

__all__ = [
    "AdaptOptionsRecord",
    "DecisionRecord",
    "HindranceRecord",
    "PoolRecord",
    "PoolSetRecord",
    "TaskRecord",
]


class AdaptOptionsRecord(TypedDict):
    """The fields of `AdaptOptions`."""

    policy: str
    threshold: str
    growth: float
    energy: float
    soft: float
    budget: str
    block: int
    select: str
    from_: str
    steps: int
    lr: str
    batch: int
    window: int
    warmup: int
    texts: int
    precision: str
    seed: int


class HindranceRecord(TypedDict):
    """What a set would lose of a new task's gradient. Angles in degrees; excess: the share taken beyond chance."""

    angle: float
    chance: float
    excess: float
    own_angle: float
    own_chance: float
    own_excess: float
    random_excess: float
    loss: float
    recognised: float


class DecisionRecord(TypedDict):
    """Whether a set was reused or grown for a task, and why."""

    action: Literal["grow", "reuse"]
    set: str
    reason: str
    policy: str
    control: str | None
    base_loss: float
    sets: dict[str, HindranceRecord]


class TaskRecord(TypedDict):
    """A task of a set. Losses are nats per token of held-out text: of the base, before and after training."""

    data: str
    tokens: int
    rate: float
    tried: dict[str, float | None]
    base: float
    before: float
    after: float
    kept: bool
    limit: float
    decision: DecisionRecord
    options: AdaptOptionsRecord


class PoolSetRecord(TypedDict):
    """A set of a pool; its tasks in the order in which they came."""

    block: int
    blocks: int
    bytes: int
    tasks: dict[str, TaskRecord]


class PoolRecord(TypedDict):
    """A pool of sets: what they lie over, the sets, and the angles between what their tasks made the layers see."""

    base: str
    limit: float
    sets: dict[str, PoolSetRecord]
    angles: dict[str, float]
