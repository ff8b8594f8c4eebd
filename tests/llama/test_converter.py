"""llama.cpp's own converter on the same models: the same names, shapes, keys and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama.environment import convert, needs_converter
from support.gguf_models import MODELS, PROMPT, save_gguf_model

import swquant

# What says who made a file, or what its tensors are rounded to; what only one of the two says; and how text is split,
# which the converter does not know of tiny tokenizers (transformers gives those of Qwen 2 an expression of its own).
OWN = (
    "GGUF.",
    "swquant.",
    "general.file_type",
    "general.quantized_by",
    "general.quantization_version",
    "general.size_label",
    "general.name",
    "general.sampling",
    "tokenizer.ggml.pre",
)


def keys(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith(OWN)}


@needs_converter
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"phi3", "gemma2"}))  # of these it reads tokenizer.model alone
def test_it_says_the_same(name: str, tmp_path: Path) -> None:
    save_gguf_model(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "theirs.gguf")
    swquant.compress(
        tmp_path / "model", tmp_path / "ours.gguf", format="gguf", type="Q8_0", refine="none", prompt=PROMPT
    )
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert keys(ours) == keys(theirs)
    held = {tensor.name: tensor for tensor in ours.tensors}
    assert set(held) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        mine = held[tensor.name]
        decoded, expected = gguf.dequantize(mine.data, mine.tensor_type), np.asarray(tensor.data)
        if name == "gemma3" and tensor.name == "token_embd.weight":
            decoded = decoded[: len(expected)]  # rows that no token has, which it lists as tokens all the same
        else:
            assert mine.shape.tolist() == tensor.shape.tolist()
        assert (mine.tensor_type.name, tensor.tensor_type.name) in (("F32", "F32"), ("Q8_0", "F32"))
        if mine.tensor_type.name == "F32":
            assert np.array_equal(decoded, expected.reshape(decoded.shape)), tensor.name
        else:
            assert np.abs(decoded - expected).max() < 0.01 * np.abs(expected).max(), tensor.name
