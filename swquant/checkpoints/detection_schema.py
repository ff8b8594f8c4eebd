"""The types of a detection in a manifest, as those of `schema`: super weights, super activations, layers."""

# No `from __future__ import annotations`, as in `schema`.
from typing import NotRequired

from typing_extensions import TypedDict

__all__ = ["DetectionRecord", "LayerRecord", "PublishedRecord", "SuperActivationRecord", "SuperWeightRecord"]


class SuperWeightRecord(TypedDict):
    """The fields of `calibrationless.SuperWeight`."""

    name: str
    layer: int
    row: int
    col: int
    value: float
    role: str
    token: int
    input: float
    output: float
    share: float
    residual: float
    kl: float
    loss: float


class SuperActivationRecord(TypedDict):
    """The fields of `calibrationless.SuperActivation`."""

    channel: int
    token: int
    value: float
    born: int
    gone: int | None
    magnitudes: list[float]


class LayerRecord(TypedDict):
    """The fields of `calibrationless.LayerSpike`."""

    layer: int
    name: str
    input: float
    input_channel: int
    output: float
    output_channel: int


class PublishedRecord(TypedDict):
    """A model of this shape in the paper's Table 2, and its (layer, row, col)."""

    model: str
    coordinates: list[list[int]]


class DetectionRecord(TypedDict):
    """What the one prompt showed."""

    prompt: str
    token_ids: list[int]
    tokens: list[str]
    rounds: int
    super_weights: list[SuperWeightRecord]
    cancellers: list[SuperWeightRecord]
    super_activations: list[SuperActivationRecord]
    layers: list[LayerRecord]
    published: list[PublishedRecord]
    unseen: NotRequired[list[str]]
    unseen_layers: NotRequired[list[int]]
