"""Where each tensor of a checkpoint goes in a GGUF file: under which name, with which rows first, several in one.

Names are those of the gguf package's tables. llama.cpp rotates neighbours where transformers rotates halves, so the
rows of q and k lie in another order; the experts of a mixture are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from exporters.errors import SwquantError
from exporters.gguf.architectures import Architecture, Config

__all__ = ["Place", "places", "row_order"]

# Buffers of old checkpoints, which are no weights.
_UNUSED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)\.(?P<part>\w+)(?P<suffix>\.weight)")
_LAYER = re.compile(r"\.(?P<number>\d+)\.")
# Always float32: a few numbers each, and what reads them takes nothing else.
_FLOAT32 = (".ffn_gate_inp.weight", "_norm.weight", ".bias")


@dataclass(frozen=True)
class Place:
    """One tensor of the file. sources: stored names, those of a mixture's experts in their order. heads: of those whose
    rows are reordered, 0 for none. shift: what is added."""

    name: str
    sources: tuple[str, ...]
    heads: int = 0
    shift: float = 0.0

    @property
    def float32(self) -> bool:
        """Whether it is stored so, whatever the checkpoint has."""
        return self.name.endswith(_FLOAT32)


def places(model: str, names: Iterable[str], architecture: Architecture, config: Config) -> tuple[Place, ...]:
    """The tensors of the file, in the order of the checkpoint. Raises SwquantError for a name that has no place."""
    table = gguf.get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if name.endswith(_UNUSED):
            continue
        plain, number = _without_expert(name)
        target = table.get_name(plain.removeprefix("language_model."), try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SwquantError(
                f"{model}: {name} has no place in a GGUF file of the architecture {architecture.name}; export what is a text "
                "model of it"
            )
        found.setdefault(target, {})[number] = name
    return tuple(_place(target, parts, architecture, config) for target, parts in found.items())


def _without_expert(name: str) -> tuple[str, int]:
    """The name of the tensor that an expert's is part of, and which part."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, 0
    merged = f"{match['before']}.{match['part']}{match['suffix']}"
    if ".block_sparse_moe." in merged:  # under Mixtral's name, which the table has without the model
        merged = re.sub(r".*layers\.(\d+)\.block_sparse_moe", r"layers.\1.feed_forward", merged)
    return merged, int(match["number"])


def _place(target: str, parts: dict[int, str], architecture: Architecture, config: Config) -> Place:
    heads = 0
    if architecture.permuted and ".attn_q." in target:
        heads = int(config["num_attention_heads"])
    if architecture.permuted and ".attn_k." in target:
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    shift = architecture.norm_shift if target.endswith("_norm.weight") else 0.0
    return Place(target, tuple(parts[number] for number in sorted(parts)), heads, shift)


def row_order(rows: int, heads: int) -> Tensor:
    """int64 [rows]: which row comes where in the file. Of each head, the first half and the second take turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
