"""From what was asked of `compress` to what a GGUF type is: its bits, its block, nothing that the file cannot hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from exporters.errors import SwquantError
from swquant.export.gguf.options import GgufOptions

if TYPE_CHECKING:
    from swquant.compress.options import CompressOptions

__all__ = ["chosen_type", "suited"]

_AUTO = {4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
_EMBEDDING = "a GGUF file has types for both, as in --embedding-type Q8_0"
_OFFSETS = {("none", 4): "Q4_0", ("none", 5): "Q5_0", ("float", 4): "Q4_1", ("float", 5): "Q5_1"}


def chosen_type(options: CompressOptions, export: GgufOptions) -> str:
    """The name of the type that rounded weights get, where their shape allows. Raises SwquantError for bits that none
    has, and for options that contradict each other."""
    bits = options.bits
    if export.type != "auto":
        own = int(export.type[1])
        if bits not in (own, type(options).bits):
            raise SwquantError(f"--bits {bits} and --type {export.type} contradict each other; give one of them")
        if options.offsets is not None:
            raise SwquantError(
                f"--offsets {options.offsets}: --type {export.type} says whether there are any; leave it out"
            )
        return export.type
    if options.offsets not in (None, "none", "float"):
        raise SwquantError(f"--offsets {options.offsets}: GGUF holds none or float; leave it out, and --type decides")
    if bits not in _AUTO:
        raise SwquantError(
            f"--bits {bits}: the GGUF types written here have {', '.join(map(str, _AUTO))}; use one of these"
        )
    return _OFFSETS.get((options.offsets or "", bits), _AUTO[bits])


def suited(options: CompressOptions, export: GgufOptions) -> CompressOptions:
    """The options as a plan for a GGUF file needs them. Raises SwquantError for what it cannot hold."""
    name = chosen_type(options, export)
    if options.block not in (None, "32"):
        raise SwquantError(f"--block {options.block}: the block of a GGUF type is part of it; leave it out, or give 32")
    for unheld, what in (
        (options.outliers, f"--outliers {options.outliers}: a GGUF file has no place for weights beside its blocks"),
        (options.activations != "none", f"--activations {options.activations}: llama.cpp rounds activations itself"),
        (not options.symmetric, "--asymmetric: the GGUF types with an offset are Q4_1, Q5_1, Q4_K and Q5_K (--type)"),
        (options.parsed_clip, f"--clip {options.clip}: belongs to plain rounding into free blocks"),
        (options.bits_for, "--bits-for: one type for all weights is written here"),
        (options.embedding_bits, f"--embedding-bits {options.embedding_bits}: {_EMBEDDING}"),
        (options.lm_head_bits, f"--lm-head-bits {options.lm_head_bits}: {_EMBEDDING}"),
        (options.bits_budget, f"--bits-budget {options.bits_budget}: one type for all weights is written here"),
    ):
        if unheld:
            raise SwquantError(f"{what}; leave it out")
    return replace(options, bits=int(name[1]), block="32", outliers=None, restore=False)
