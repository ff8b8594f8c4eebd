"""What onnxruntime-genai's builder (0.18) draws otherwise than the model computes, known before it is run.

It walks over the modules of a model and takes every linear layer with as many outputs as there are words for the
output head; and it draws plain rotary embeddings for some architectures, whatever kind the configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporters.errors import SwquantError
from swquant.export.onnx.lengths import rope_types
from swquant.models.architecture import Architecture, LinearKind

__all__ = ["check_builder"]

# Architectures whose class in the builder looks for these kinds alone and draws the default for all others.
_ROPES = {"llama": {"default", "llama3"}, "smollm3": {"default", "llama3"}}


def check_builder(name: str, config: Any, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise SwquantError where the builder's graph would be another model. shapes: stored name -> [out, in]."""
    text = config.get_text_config()
    for weight in architecture.weights.values():
        if weight.kind is LinearKind.LINEAR and shapes[weight.name][0] == text.vocab_size:
            raise _refused(
                name,
                f"it takes {weight.module} for the output head, since it has as many outputs as there are words, "
                f"{text.vocab_size}",
            )
    known = _ROPES.get(text.model_type)
    for kind in sorted(rope_types(config)):
        if "dynamic" in kind:
            raise _refused(name, f"its rotary table ends where rope type {kind} begins to change")
        if known is not None and kind not in known:
            raise _refused(name, f"it draws plain rotary embeddings where a {text.model_type} has rope type {kind}")


def _refused(name: str, reason: str) -> SwquantError:
    return SwquantError(f"{name}: onnxruntime-genai's builder cannot export this model ({reason}); use --graph dynamo")
