"""The types of the manifest: every key that `swquant/manifest.json` can have, of a checkpoint and of what is exported.

Writers build these, `read_manifest` checks what it reads against them, so readers need no check of their own, and mypy
knows every key. docs/format.md says what each key means; a test compares the two. To add a key, add it here as
`NotRequired` (a manifest of yesterday lacks it) and there.

What a type cannot say (that a file exists, that a channel lies inside a weight) is checked by whoever relies on it.
"""

# No `from __future__ import annotations`: it would hide from a TypedDict which of its keys are required.
from typing import Literal, NotRequired, final

from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

from swquant.checkpoints.detection_schema import DetectionRecord
from swquant.checkpoints.onnx_schema import CheckRecord, ExportRecord, NodeRecord
from swquant.checkpoints.pool_schema import PoolRecord

__all__ = [
    "FORMAT",
    "UNUSED",
    "VERSION",
    "ActivationsRecord",
    "CheckpointContent",
    "CheckpointManifest",
    "CheckpointTotals",
    "CompressionRecord",
    "DenseRecord",
    "ExportTotals",
    "FileEntry",
    "InputsRecord",
    "Manifest",
    "MergeRecord",
    "MlxContent",
    "MlxManifest",
    "OnnxContent",
    "OnnxManifest",
    "OptionsRecord",
    "PatchedRecord",
    "PatchesContent",
    "PatchesManifest",
    "PointRecord",
    "RoundedRecord",
    "SourceKind",
    "SourceRecord",
    "TensorRecord",
    "TuneOptionsRecord",
    "TuningRecord",
]

FORMAT: Literal["swquant-manifest"] = "swquant-manifest"
VERSION: Literal[1] = 1

SourceKind = Literal["safetensors", "gguf", "swquant"]


class SourceRecord(TypedDict):
    """What it was made from."""

    name: str
    kind: SourceKind
    fingerprint: str


class OptionsRecord(TypedDict):
    """The fields of `CompressOptions`."""

    bits: int
    block: str
    symmetric: bool
    offsets: NotRequired[str]
    preset: str
    refine: str | None
    texts: int
    text_from: NotRequired[str | None]
    clip: str
    restore: bool
    outliers: float | None
    bits_budget: float | None
    bits_for: NotRequired[list[str]]
    embedding_bits: NotRequired[int]
    lm_head_bits: NotRequired[int]
    dense: list[str]
    strict_block: bool
    allow_dense: NotRequired[bool]
    activations: str
    activation_scale: str | None
    activation_range: str | None
    dtype: str
    shard_size: str
    prompt: str
    seed: int


class ActivationsRecord(TypedDict):
    """How the inputs of linear layers are rounded."""

    dtype: Literal["int8"]
    scale: Literal["per-token", "per-tensor"]
    range: Literal["dynamic", "static"]
    declared: bool


class InputsRecord(TypedDict):
    """The inputs of one linear layer that are not rounded, and why."""

    channels: list[int]
    peaks: list[float]
    median: float
    norm: str | None
    scale: NotRequired[float]


class PointRecord(TypedDict):
    """A super weight in a rounded tensor, and what a loader sees that does not know the sidecar."""

    row: int
    col: int
    value: float
    without_sidecar: float


class _Stored(TypedDict):
    shape: list[int]
    source_dtype: str
    file: str
    bytes: int
    sha256: dict[str, str]
    scaled: NotRequired[bool]
    blocks: NotRequired[dict[str, int]]


# Why a tensor stays dense that no loader looks at: a buffer of old, a layer of another class. It may hold NaN.
UNUSED = "not a parameter of the model"


@final
class DenseRecord(_Stored):
    """A tensor that stays as it is, and why."""

    dense: str


@final
class RoundedRecord(_Stored):
    """A tensor that is stored as codes, and what its rounding cost."""

    bits: int
    block: str
    symmetric: bool
    stored_as: str
    outliers: int
    relative_error: float
    largest_error: float
    output_error: NotRequired[float]
    inputs: NotRequired[InputsRecord]
    super_weights: NotRequired[list[PointRecord]]


# `"dense" in record` tells which.
TensorRecord = DenseRecord | RoundedRecord


class TuneOptionsRecord(TypedDict):
    """The fields of `TuneOptions`."""

    train: NotRequired[str]
    budget: str
    block: int
    select: str | None
    from_: str
    warmup: int
    steps: int
    lr: str
    batch: int
    window: int
    texts: int
    precision: str
    seed: int


class TuningRecord(TypedDict):
    """How a set of blocks was trained, or scales were. Losses are nats per token, held-out ones those of text that no
    step saw."""

    base: str
    against: SourceRecord | None
    data: str
    options: TuneOptionsRecord
    blocks: int
    scales: NotRequired[int]
    bytes: int
    tokens: int
    rate: float
    tried: dict[str, float | None]
    held_out_before: float
    held_out_after: float
    losses: list[float]


class MergeRecord(TypedDict):
    """Sets of patches that became part of the codes, and how far from the model with the patches that is: KL on text of
    its own, in nats per token, for whoever ignored the sidecar and for the merged one."""

    base: str
    sets: list[str]
    texts: int
    seed: int
    tensors: int
    kl_without: float
    kl_merged: float


class PatchedRecord(TypedDict):
    """A tensor that patches lie over: the shape and sha256 that it must have, and how many blocks of each set."""

    shape: list[int]
    sha256: str
    blocks: dict[str, int]


class FileEntry(TypedDict):
    """Size and hash of a file."""

    bytes: int
    sha256: str


class CheckpointTotals(TypedDict):
    """Sums over all tensors and files."""

    bits_per_quantized_weight: float
    quantized_weights: int
    weights: int
    bytes: int
    source_bytes: int


class ExportTotals(TypedDict):
    """Sums over all files of an exported folder."""

    bytes: int


class CompressionRecord(TypedDict):
    """How the exported checkpoint was made."""

    source: SourceRecord
    options: OptionsRecord


class _Seal(TypedDict):
    format: Literal["swquant-manifest"]
    version: Literal[1]
    digest: str


class _Common(TypedDict):
    swquant: str
    source: SourceRecord
    detection: DetectionRecord
    tensors: dict[str, TensorRecord]
    files: dict[str, FileEntry]


class CheckpointContent(_Common):
    """What `compress` says of a checkpoint."""

    options: OptionsRecord
    fingerprint: str
    device: NotRequired[str]
    activations: ActivationsRecord | None
    loaders: dict[str, str]
    totals: CheckpointTotals
    notes: list[str]
    left_out: dict[str, str]
    tuned: NotRequired[dict[str, TuningRecord]]
    merged: NotRequired[list[MergeRecord]]
    pool: NotRequired[PoolRecord]


class OnnxContent(_Common):
    """What `export` says of an ONNX folder; its `tensors` are none."""

    kind: Literal["onnx"]
    options: ExportRecord
    compression: CompressionRecord
    check: CheckRecord
    operators: dict[str, int]
    weights: dict[str, NodeRecord]
    totals: ExportTotals


class MlxContent(_Common):
    """What `export` says of a folder for MLX; its `tensors` are none. bits, group_size: of most layers. quantized,
    dense: how many tensors are. left_out: what the checkpoint has and MLX cannot hold."""

    kind: Literal["mlx"]
    compression: CompressionRecord
    bits: int
    group_size: int
    quantized: int
    dense: int
    left_out: list[str]
    totals: ExportTotals


class PatchesContent(TypedDict):
    """What `tune` says of patches alone: which model they belong to (`source`, `tensors`), how they were trained."""

    kind: Literal["patches"]
    swquant: str
    source: SourceRecord
    tensors: dict[str, PatchedRecord]
    files: dict[str, FileEntry]
    tuned: dict[str, TuningRecord]
    totals: ExportTotals


@final
class CheckpointManifest(CheckpointContent, _Seal):
    """The manifest of a compressed checkpoint, which has no `kind`."""


@final
class OnnxManifest(OnnxContent, _Seal):
    """The manifest of an ONNX folder."""


@final
class MlxManifest(MlxContent, _Seal):
    """The manifest of a folder for MLX."""


@final
class PatchesManifest(PatchesContent, _Seal):
    """The manifest of a folder of patches alone."""


Manifest = CheckpointManifest | OnnxManifest | MlxManifest | PatchesManifest
