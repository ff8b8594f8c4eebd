"""What onnxruntime-genai's builder (0.18) draws otherwise than the model computes, known before it is run.

It walks over the modules of a model and takes every linear layer with as many outputs as there are words for the
output head; and it draws plain rotary embeddings for some architectures, whatever kind the configuration names.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint
from swquant.export.onnx.lengths import rope_types
from swquant.models.architecture import Architecture, LinearKind
from swquant.models.stock import empty_model

__all__ = ["check_builder"]

# Architectures whose class in the builder looks for these kinds alone and draws the default for all others.
_ROPES = {"llama": {"default", "llama3"}, "smollm3": {"default", "llama3"}}


def check_builder(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise SwquantError where the builder is not installed, does not know the model, or would draw another one."""
    name, config = checkpoint.name, checkpoint.config
    if (known_ones := _source()) and f'"{(kind := type(empty_model(checkpoint)).__name__)}"' not in known_ones:
        raise _refused(name, f"it does not know {kind}")
    text = config.get_text_config()
    for weight in architecture.weights.values():
        if weight.kind is LinearKind.LINEAR and checkpoint.tensors[weight.name].shape[0] == text.vocab_size:
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


def _source() -> str:
    """The builder's own, which names the classes that it knows and gives no other list of them."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        raise SwquantError('--graph genai needs onnxruntime-genai: pip install "swquant[cpu]"')
    path = Path(spec.origin).parent / "models" / "builder.py"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _refused(name: str, reason: str) -> SwquantError:
    return SwquantError(f"{name}: onnxruntime-genai's builder cannot export this model ({reason}); use --graph dynamo")
