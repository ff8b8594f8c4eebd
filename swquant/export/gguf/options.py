"""The options of GGUF files, declared once, as `compress.options` does for `compress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from swquant.declared import check_choices, described

__all__ = ["BLOCK_TYPES", "GgufKeywords", "GgufOptions"]

# exporters.gguf.blocks has them with all that is known of each; `swquant --help` must not wait for that.
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class GgufOptions:
    """What a GGUF file can be told. Raises SwquantError for values that it does not know."""

    type: str = described(
        "auto",
        f"{', '.join(BLOCK_TYPES)}; auto: what the codes of a checkpoint are, or the k-quant of --bits.",
        choices=("auto", *BLOCK_TYPES),
        metavar="TYPE",
    )
    embedding_type: str = described(
        "stored",
        "Of embedding and output head: stored (their floats), or one of these types.",
        choices=("stored", *BLOCK_TYPES),
        metavar="TYPE",
    )
    tokenizer: str | None = described(
        None, "Take the vocabulary from this GGUF file of the same model.", metavar="FILE"
    )
    imatrix: str | None = described(
        None, "Also write the prompt's energy for llama-quantize to FILE (.gguf or .dat).", metavar="FILE"
    )

    def __post_init__(self) -> None:
        check_choices(self)

    def resolved(self, int8: bool) -> GgufOptions:
        """As they are; int8 activations are refused elsewhere."""
        return self

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GgufKeywords(TypedDict, total=False):
    """The fields again, as keywords that editors complete; a test compares the two."""

    type: str
    embedding_type: str
    tokenizer: str | None
    imatrix: str | None
