"""The types of an ONNX folder's manifest, as those of `schema`: how it was exported, its nodes, and how it compares."""

# No `from __future__ import annotations`, as in `schema`.
from typing import NotRequired

from typing_extensions import TypedDict

__all__ = ["CheckRecord", "ExportRecord", "NodeRecord"]


class ExportRecord(TypedDict):
    """The fields of `ExportOptions`."""

    graph: str
    precision: str
    accuracy_level: int | None
    lm_head_bits: int


class CheckRecord(TypedDict):
    """How the graph compares with the model that it was made from."""

    runtime: str
    prompt_tokens: int
    generated_tokens: int
    same_tokens: int
    operator_library: bool
    largest_difference: float
    tolerance: float
    without_outliers: float | None
    providers: dict[str, int]
    long_tokens: NotRequired[int]
    unreached: NotRequired[list[int]]


class NodeRecord(TypedDict):
    """A quantized linear layer of the graph."""

    shape: list[int]
    operator: str
    bits: int
    block: int
    offsets: NotRequired[bool]
    outliers: int
    trained_blocks: NotRequired[int]
    channels: int
    bytes: int
