"""The options of `compress`, declared once: the command line shows these texts, the manifest records these values.

An option's fingerprint, together with the source's, identifies a result: equal fingerprints, equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypedDict, cast

from exporters.errors import SwquantError
from swquant.declared import check_choices, described, flag
from swquant.detect.prompt import DEFAULT_PROMPT, PROMPT_HELP
from swquant.units import parse_bytes

if TYPE_CHECKING:
    import torch

    from calibrationless import Block, Clip
    from exporters.layouts import Layout
    from swquant.checkpoints.schema import OptionsRecord

__all__ = ["OFFSETS", "PRESETS", "CompressKeywords", "CompressOptions"]

# What each preset refines the rounding with.
PRESETS = {"fast": "none", "balanced": "prompt", "best": "self"}

# A checkpoint holds floats, an ONNX file bytes too; None leaves it to the format.
OFFSETS = ("none", "float", "byte")

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class CompressOptions:
    """What `compress` can be told. Raises SwquantError for values that make no sense, alone or together."""

    bits: int = described(4, "Bits per weight, 2 to 8. vLLM takes 4 everywhere, 8 on CUDA.", group="basic", metavar="N")
    block: str | None = described(
        None,
        "Weights that share a scale: 128, 64x64, channel, tensor or flat:512; 128, or channel for 8 bits and int8 activations.",
        group="basic",
        metavar="BLOCK",
    )
    symmetric: bool = described(
        True, "Signed-maximum scale without zero point, or min/max with one.", group="rounding", off="asymmetric"
    )
    offsets: str | None = described(
        None,
        "Real offsets: float (not for vLLM), byte (onnx) or none.",
        group="rounding",
        choices=OFFSETS,
        metavar="KIND",
        called="offsets",
    )
    preset: str = described(
        "balanced",
        "fast (rounding alone), balanced (scales searched with one prompt) or best (with text the model writes).",
        group="basic",
        choices=tuple(PRESETS),
        called="preset",
    )
    refine: str | None = described(
        None,
        "What rounding is refined with: none, prompt or self; the preset's by default.",
        group="rounding",
        choices=tuple(PRESETS.values()),
        metavar="HOW",
        called="refine",
    )
    texts: int = described(
        16, "Texts of 256 tokens that the model writes itself for --refine self.", group="rounding", metavar="N"
    )
    text_from: str | None = described(
        None,
        "A model with the same tokenizer that writes them instead.",
        group="rounding",
        metavar="MODEL",
    )
    clip: str = described(
        "none",
        "Cut each block's outliers, then round plainly: z=9, iqr=3, quantile=0.999 or none.",
        group="rounding",
        metavar="RULE",
    )
    restore: bool = described(
        True, "Keep super weights and outliers exactly, in the sidecar.", group="rounding", off="no-restore"
    )
    outliers: float | None = described(
        None,
        "Fraction of each tensor kept in the sidecar, by the error it costs; 0.0005 with --refine prompt, but for byte offsets, else 0.",
        group="basic",
        metavar="FRACTION",
    )
    bits_budget: float | None = described(
        None,
        "Stored bits per weight, on average: each tensor gets bits by what rounding it does to the model's own text.",
        group="tensors",
        metavar="BITS",
    )
    bits_for: tuple[str, ...] = described(
        (),
        "PATTERN=N: other bits for tensors of such a name; the last that matches counts; repeatable.",
        group="tensors",
        metavar="PATTERN=N",
        called="bits-for",
    )
    embedding_bits: int = described(
        0,
        "Round the embedding, too, and an output head tied to it; 0 leaves it alone.",
        group="tensors",
        choices=(0, 4, 8),
    )
    lm_head_bits: int = described(
        0,
        "Round the output head, too, and an embedding tied to it; 0 leaves it alone.",
        group="tensors",
        choices=(0, 4, 8),
    )
    dense: tuple[str, ...] = described(
        (),
        "Leave tensors whose name contains PATTERN (or matches a * glob) alone; repeatable.",
        group="tensors",
        metavar="PATTERN",
    )
    strict_block: bool = described(
        False, "Fail where the block does not divide a tensor; else a smaller is taken.", group="rounding"
    )
    allow_dense: bool = described(
        False, "Go on where less than half of the linear weights can be packed.", group="output"
    )
    activations: str = described(
        "none",
        "Round the inputs of every compressed linear layer, too.",
        group="activations",
        choices=("none", "int8"),
    )
    activation_scale: str | None = described(
        None,
        "Activations that share a scale; per-token, or per-tensor if static.",
        group="activations",
        choices=("per-token", "per-tensor"),
    )
    activation_range: str | None = described(
        None,
        "Where their scale comes from: dynamic (each input's own) or static (the one prompt); dynamic.",
        group="activations",
        choices=("dynamic", "static"),
    )
    dtype: str = described(
        "auto",
        "Of dense tensors and scales: auto (the source's), bfloat16, float16 or float32.",
        group="output",
        choices=("auto", *_DTYPES),
        metavar="DTYPE",
        called="dtype",
    )
    shard_size: str = described("5GB", "Largest size of one file of weights.", group="output", metavar="SIZE")
    prompt: str = described(DEFAULT_PROMPT, PROMPT_HELP, metavar="TEXT")
    seed: int = described(
        0,
        "Of the text that the model writes for --refine self and --bits-budget; nothing else is random.",
        metavar="N",
    )

    def __post_init__(self) -> None:
        from calibrationless import check_bits  # here, not above: `swquant --help` must not wait for torch

        check_choices(self)
        try:
            check_bits(self.bits)
            self.parsed_block, self.parsed_clip  # noqa: B018 - raise on nonsense now, not after the probe
        except ValueError as error:
            raise SwquantError(str(error)) from None
        if self.bits_budget is not None and self.bits != CompressOptions.bits:
            raise SwquantError(
                f"bits {self.bits} and a budget of {self.bits_budget:g} bits per weight contradict each other; give one of them"
            )
        self._check_bits_for()
        if self.refinement != "none" and self.parsed_clip is not None:
            raise SwquantError(
                f"clip {self.clip} belongs to plain rounding, and --refine {self.refine} decides itself what to cut; use one"
            )
        self._check_offsets()
        if not 1 <= self.texts <= 256:
            raise SwquantError(f"texts {self.texts} is outside 1 to 256; 16 is the default, and 64 has helped")
        if self.texts != CompressOptions.texts and self.refinement != "self":
            raise SwquantError(
                f"--texts {self.texts} is what the model writes for --refine self; add it, or --preset best"
            )
        if self.text_from is not None and self.refinement != "self":
            raise SwquantError(f"--text-from {self.text_from} writes text for --refine self; add it, or --preset best")
        if self.outliers is not None and not 0 <= self.outliers <= 0.1:
            raise SwquantError(f"outliers {self.outliers:g} is outside 0 to 0.1; 0.0005 keeps one weight in 2,000")
        if self.outliers and not self.restore:
            raise SwquantError("--outliers needs the sidecar that --no-restore leaves out; use one of the two")
        self._check_activations()
        if any(not pattern for pattern in self.dense):
            raise SwquantError("an empty --dense pattern would match every tensor; name a part of a tensor's name")
        if parse_bytes(self.shard_size) < 1_000_000:
            raise SwquantError(f"shard size {self.shard_size} is below 1MB; the usual size is 5GB")

    def _check_bits_for(self) -> None:
        from calibrationless import check_bits

        for rule in self.bits_for:
            pattern, _, bits = rule.rpartition("=")
            if not pattern or not bits.isdecimal():
                raise SwquantError(f"--bits-for {rule} is not PATTERN=N, as in --bits-for down_proj=6")
            try:
                check_bits(int(bits))
            except ValueError as error:
                raise SwquantError(f"--bits-for {rule}: {error}") from None
        if self.bits_for and self.bits_budget is not None:
            raise SwquantError(
                f"--bits-budget {self.bits_budget:g} chooses the bits of every tensor, and --bits-for of some; use one of the two"
            )

    def _check_offsets(self) -> None:
        if self.offset_kind == "none":
            return
        from exporters.affine_layout import BITS  # here: `swquant --help` must not wait for torch

        given = f"--offsets {self.offsets}"
        if not self.symmetric or self.parsed_clip is not None:
            other = f"clip {self.clip}" if self.symmetric else "--asymmetric"
            raise SwquantError(f"{given} and {other} are two ways to choose a block's codes; use one")
        if self.offset_kind == "byte":
            return
        if self.bits not in BITS:
            raise SwquantError(f"{given} with {self.bits} bits: the layout that holds offsets takes 2, 4 or 8")
        if self.bits_budget is not None or self.bits_for or self.activations != "none":
            other = "--bits-budget" if self.bits_budget is not None else "--bits-for"
            other = other if self.activations == "none" else f"--activations {self.activations}"
            raise SwquantError(f"{given} does not go with {other}: one scheme for all weights, decoded while loading")

    def _check_activations(self) -> None:
        for name in ("activation_scale", "activation_range"):
            if self.activations == "none" and getattr(self, name) is not None:
                raise SwquantError(
                    f"{flag(name)} {getattr(self, name)} says how activations are rounded, and they are not; add --activations int8"
                )
        if (self.activation_scale, self.activation_range) == ("per-token", "static"):
            raise SwquantError(
                "--activation-scale per-token cannot be static: no prompt holds the tokens to come; "
                "use --activation-scale per-tensor or --activation-range dynamic"
            )

    @property
    def block_name(self) -> str:
        """The block as it is typed. Integer products of 8-bit codes want one scale for a whole row of weights."""
        return self.block or ("channel" if self.bits == 8 and self.activations == "int8" else "128")

    @property
    def per_token(self) -> bool:
        """Whether every token of rounded activations has a scale of its own."""
        return (self.activation_scale or ("per-tensor" if self.static else "per-token")) == "per-token"

    @property
    def static(self) -> bool:
        """Whether the scale of activations is that of the one prompt."""
        return self.activation_range == "static"

    @property
    def refinement(self) -> str:
        """none, prompt or self: what the rounding is refined with. A rule for clipping is one of plain rounding, so it
        chooses that."""
        return self.refine or ("none" if self.parsed_clip else PRESETS[self.preset])

    @property
    def own_tokens(self) -> int:
        """Of the text that the model writes itself, and reads layer by layer; 0 without --refine self."""
        from swquant.detect.texts import LENGTH  # here: `swquant --help` must not wait for torch

        return self.texts * LENGTH if self.refinement == "self" else 0

    @property
    def outlier_fraction(self) -> float:
        """Of each tensor, beside its super weights."""
        if self.outliers is not None:
            return self.outliers
        # Offsets leave few weights far from their codes: smaller blocks are the better buy there. Feedback spreads what
        # rounding costs over the columns behind it, but nothing of what an outlier costs: a loader that does not know
        # the sidecar would get outliers that nobody made up for.
        return 0.0005 if self.restore and self.refinement == "prompt" and self.offset_kind != "byte" else 0.0

    @property
    def parsed_block(self) -> Block:
        from calibrationless import parse_block

        return parse_block(self.block_name)

    @property
    def parsed_clip(self) -> Clip | None:
        from calibrationless import parse_clip

        return parse_clip(self.clip)

    @property
    def offset_kind(self) -> str:
        """none, float or byte."""
        return self.offsets or "none"

    @property
    def layout(self) -> Layout:
        """How rounded weights are stored."""
        from exporters.layouts import LAYOUTS

        return LAYOUTS[self.offset_kind]

    def suiting(self, offsets: str) -> CompressOptions:
        """These options with the offsets that a format holds best, unless they were chosen. Plain rounding, zero points
        and 8 bits gain nothing from them, and blocks of other forms than a line cannot have them."""
        from calibrationless import Channel, Group

        if self.offsets is not None:
            return self
        line = isinstance(self.parsed_block, Group | Channel)
        gains = self.symmetric and self.refinement != "none" and self.bits < 8
        return replace(self, offsets=offsets if line and gains else "none")

    @property
    def parsed_dtype(self) -> torch.dtype | None:
        import torch

        return getattr(torch, self.dtype) if self.dtype in _DTYPES else None

    @property
    def suffix(self) -> str:
        """What is appended to a model's name for the default OUT: `-w4-b128`, `-w8a8-bchannel`."""
        bits = self.bits if self.bits_budget is None else f"{self.bits_budget:g}"
        activations = "a8" if self.activations == "int8" else ""
        offsets = "-offsets" if self.offset_kind == "float" else ""
        return f"-w{bits}{activations}-b{self.block_name}{offsets}".replace(":", "")

    def as_dict(self) -> OptionsRecord:
        values = {**asdict(self), "block": self.block_name, "offsets": self.offset_kind}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return cast("OptionsRecord", values)

    def fingerprint(self, source: str) -> str:
        """sha256 over the source's fingerprint and every option."""
        return hashlib.sha256(json.dumps([source, self.as_dict()], sort_keys=True).encode()).hexdigest()


class CompressKeywords(TypedDict, total=False):
    """The fields again, as keywords of `swquant.compress` that editors complete; a test compares the two."""

    bits: int
    block: str | None
    symmetric: bool
    offsets: str | None
    preset: str
    refine: str | None
    texts: int
    text_from: str | None
    clip: str
    restore: bool
    outliers: float | None
    bits_budget: float | None
    bits_for: tuple[str, ...]
    embedding_bits: int
    lm_head_bits: int
    dense: tuple[str, ...]
    strict_block: bool
    allow_dense: bool
    activations: str
    activation_scale: str | None
    activation_range: str | None
    dtype: str
    shard_size: str
    prompt: str
    seed: int
