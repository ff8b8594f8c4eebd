"""The options of `export`, declared once, as `options` does for `compress`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from exporters.errors import SwquantError
from swquant.declared import described

__all__ = ["FORMATS", "ExportOptions", "export_options"]

# What `compress` writes -> what the default name of OUT ends in.
FORMATS = {"checkpoint": "", "onnx": "-onnx"}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "graph": ("dynamo", "genai"),
    "precision": ("fp32", "fp16"),
    "accuracy_level": (None, 0, 4),
    "lm_head_bits": (0, 4, 8),
}


@dataclass(frozen=True)
class ExportOptions:
    """What `export` can be told. Raises SwquantError for values that it does not know."""

    graph: str = described(
        "dynamo", "dynamo (torch's exporter, any architecture) or genai (onnxruntime-genai's builder, faster)."
    )
    precision: str = described("fp32", "Of activations, scales and dense weights: fp32 or fp16.")
    accuracy_level: int | None = described(
        None,
        "Arithmetic of products: 0 (float) or 4 (activations rounded to int8; faster); by default as CHECKPOINT says: 4 where its activations are int8, otherwise 0.",
    )
    lm_head_bits: int = described(
        0, "Round the output head, too, and an embedding tied to it: 8 or 4 bits in blocks of 32; 0 leaves them alone."
    )

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                flag = "--" + name.replace("_", "-")
                raise SwquantError(
                    f"{flag} {value} is not one of: {', '.join(str(choice) for choice in known if choice is not None)}"
                )

    def resolved(self, int8: bool) -> ExportOptions:
        """With an accuracy level. int8: whether the checkpoint rounds its activations."""
        return replace(self, accuracy_level=4 if int8 else 0) if self.accuracy_level is None else self

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_options(form: str, given: Mapping[str, Any]) -> ExportOptions | None:
    """What `compress` is told of the export that follows it; None for a checkpoint, which has none. Raises SwquantError."""
    if form not in FORMATS:
        raise SwquantError(f"format {form!r} is not one of: {', '.join(FORMATS)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    if form == "onnx":
        return ExportOptions(**chosen)
    if chosen:
        raise SwquantError(f"--{next(iter(chosen)).replace('_', '-')} is an option of the export; add --format onnx")
    return None
