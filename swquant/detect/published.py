"""The published directory: super weights that the paper lists (Table 2), to compare a detection with.

Coordinates are (layer, row, col) of `layers[layer].mlp.down_proj.weight`. A model is recognized by its
architecture, not by its name, which anyone may change: the number of layers and the sizes are enough to tell
the listed models apart, and a fine-tuned one keeps its parent's super weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swquant.checkpoints.base import Checkpoint

__all__ = ["PUBLISHED", "Published", "published_for"]


@dataclass(frozen=True)
class Published:
    """A listed model. shape: (model_type, layers, hidden, intermediate, vocabulary)."""

    model: str
    shape: tuple[str, int, int, int, int]
    coordinates: tuple[tuple[int, int, int], ...]


PUBLISHED = (
    Published("Llama-7B", ("llama", 32, 4096, 11008, 32000), ((2, 3968, 7003),)),
    Published("Llama-13B", ("llama", 40, 5120, 13824, 32000), ((2, 2231, 2278), (2, 2231, 6939))),
    Published(
        "Llama-30B", ("llama", 60, 6656, 17920, 32000), ((3, 5633, 12817), (3, 5633, 17439), (10, 5633, 14386))
    ),
    Published("Llama2-7B", ("llama", 32, 4096, 11008, 32000), ((1, 2533, 7890),)),
    Published("Llama2-13B", ("llama", 40, 5120, 13824, 32000), ((3, 4743, 7678),)),
    Published("Mistral-7B-v0.1", ("mistral", 32, 4096, 14336, 32000), ((1, 2070, 7310),)),
    Published("OLMo-1B-0724", ("olmo", 16, 2048, 8192, 50304), ((1, 1764, 1710), (1, 1764, 8041))),
    Published(
        "OLMo-7B-0724", ("olmo", 32, 4096, 11008, 50304), ((1, 269, 7467), (2, 269, 8275), (7, 269, 453), (24, 269, 2300))
    ),
    Published(
        "Phi-3-mini-4k",
        ("phi3", 32, 3072, 8192, 32064),
        ((2, 525, 808), (2, 1693, 808), (2, 1113, 808), (4, 525, 2723), (4, 1113, 2723), (4, 1693, 2723)),
    ),
    Published("Meta-Llama-3-8B", ("llama", 32, 4096, 14336, 128256), ((1, 788, 2427), (1, 1384, 2427), (1, 4062, 2427))),
)  # fmt: skip


def published_for(checkpoint: Checkpoint, directory: Iterable[Published] = PUBLISHED) -> tuple[Published, ...]:
    """The listed models of the same shape (Llama and Llama 2 share theirs), an empty tuple for an unknown one."""
    config = checkpoint.config
    shape = tuple(
        getattr(config, key, None)
        for key in ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    return tuple(entry for entry in directory if entry.shape == shape)
