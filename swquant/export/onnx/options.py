"""The options of the export to ONNX, declared once, as `compress.options` does for `compress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypedDict, cast

from swquant.declared import check_choices, described

if TYPE_CHECKING:
    from swquant.checkpoints.onnx_schema import ExportRecord

__all__ = ["ExportKeywords", "ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """What `export` can be told. Raises SwquantError for values that it does not know."""

    graph: str = described(
        "dynamo",
        "dynamo (torch's exporter, any architecture) or genai (onnxruntime-genai's builder, faster).",
        group="basic",
        choices=("dynamo", "genai"),
    )
    precision: str = described(
        "fp32", "Of activations, scales and dense weights.", group="basic", choices=("fp32", "fp16")
    )
    accuracy_level: int | None = described(
        None,
        "Arithmetic of products: 0 (float) or 4 (activations rounded to int8; faster); by default 4 where the activations "
        "of the checkpoint are int8, otherwise 0.",
        group="basic",
        choices=(0, 4),
    )
    lm_head_bits: int = described(
        0,
        "Round the output head, too, and an embedding tied to it, in blocks of 32; 0 leaves them alone.",
        group="basic",
        choices=(0, 4, 8),
    )

    def __post_init__(self) -> None:
        check_choices(self, show=str)

    def resolved(self, int8: bool) -> ExportOptions:
        """With an accuracy level. int8: whether the checkpoint rounds its activations."""
        return replace(self, accuracy_level=4 if int8 else 0) if self.accuracy_level is None else self

    def as_dict(self) -> ExportRecord:
        return cast("ExportRecord", asdict(self))


class ExportKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.export` that editors complete; a test compares the two."""

    graph: str
    precision: str
    accuracy_level: int | None
    lm_head_bits: int
