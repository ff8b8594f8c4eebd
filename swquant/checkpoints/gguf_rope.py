"""How a GGUF file stretches its rotary embedding, said in a transformers configuration.

There are two places. `rope_freqs.weight` holds a factor for every frequency of a head, by which it is divided: Llama
3.1 and later have their scaling nowhere else, and Gemma 4 marks with 1e30 the frequencies that do not rotate. And
`rope.scaling.*` in the header names a method, linear or YaRN. transformers reads neither. A model without its scaling
answers a short prompt just as well and loses the thread of a long one, so what a configuration cannot say is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from exporters.errors import SwquantError

__all__ = ["rope_scaling"]

# What all models of the Llama 3 family were trained with, but for the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_STILL = 1e29  # llama.cpp divides by 1e30 what is not to rotate
_NEVER_MIND = ("type", "factor", "original_context_length", "finetuned")


def rope_scaling(
    file: str, header: Mapping[str, Any], config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    """`rope_scaling` of the configuration, None where the rotary embedding is a plain one.

    file: for messages. header: keys of the file behind `ARCHITECTURE.rope.`. config: what transformers made of it.
    factors: float32 [half a head] of rope_freqs.weight. Raises SwquantError for what it cannot say.
    """
    named = _named(file, header)
    if factors is None or bool((factors == 1).all()) or _partial(config, factors):
        return named
    rebuilt = _llama3(factors, float(config.get("rope_theta", 10000.0)))
    if rebuilt is None or named is not None:
        odd = int(np.flatnonzero(factors != 1)[0])
        raise SwquantError(
            f"{file}: rope_freqs.weight divides frequency {odd} by {factors[odd]:.6g}, which is no scaling of the Llama 3 "
            "family and has no place in a configuration; start from the model's safetensors"
        )
    return rebuilt


def _named(file: str, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The method that the header names."""
    scaling = {key.removeprefix("scaling."): value for key, value in header.items() if key.startswith("scaling.")}
    if "scale_linear" in header:  # files of 2023
        scaling = {"type": "linear", "factor": header["scale_linear"], **scaling}
    kind, factor = scaling.get("type", "none"), float(scaling.get("factor", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    unknown = [key for key in scaling if key not in _NEVER_MIND]
    if kind == "linear" and not unknown:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and not unknown and "original_context_length" in scaling:
        original = int(scaling["original_context_length"])
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    what = f"{unknown[0]} = {scaling[unknown[0]]}" if unknown else f"the type {str(kind)[:40]!r}"
    raise SwquantError(
        f"{file}: its rope.scaling has {what}, which swquant cannot say in a configuration (known are linear, and yarn with "
        "factor and original_context_length); start from the model's safetensors"
    )


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The scaling of the Llama 3 family that gives these factors, None where none does."""
    factor = float(np.round(factors.max(), 4))
    expected = _llama3_factors(len(factors), theta, factor)
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return scaling if np.allclose(factors, expected, rtol=1e-4, atol=0) else None


def _llama3_factors(count: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for the family: 1 for short waves, `factor` for long ones, a ramp between."""
    wavelength = 2 * np.pi * theta ** (np.arange(count, dtype=np.float64) / count)
    low, high, original = _LLAMA3.values()
    smooth = ((original / wavelength - low) / (high - low)).clip(0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _partial(config: Mapping[str, Any], factors: np.ndarray) -> bool:
    """Whether the factors only say which share of a head rotates, as the configuration of Gemma 4 does by itself."""
    return config.get("model_type") == "gemma4_text" and bool(((factors == 1) | (factors > _STILL)).all())
