"""The embedding and the output head of a checkpoint as codes in an ONNX graph: the same codes, one table where tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, one_line
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant
from swquant.progress import Progress

# Neither q_proj nor an MLP has as many outputs as there are words, which the builder takes for the head.
SHAPE = {"num_hidden_layers": 1, "intermediate_size": 192}


def checkpoint(folder: Path, *, tied: bool, **given: Any) -> Path:
    model = save_model(tiny_model("llama", tie_word_embeddings=tied, **SHAPE), folder / "model", torch.bfloat16)
    how = {"prompt": PROMPT, "preset": "fast", "block": "32", **given}
    return swquant.compress(model, folder / "checkpoint", **how).path


class Notes(Progress):
    """What is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def exported(folder: Path, out: Path, **given: Any) -> dict[str, Any]:
    """The manifest: the export compared the graph with the checkpoint, or failed."""
    notes = Notes()
    manifest: Any = swquant.export(folder, out, progress=notes, **given).manifest
    assert manifest["check"]["same_tokens"] == manifest["check"]["generated_tokens"]
    return {**manifest, "notes": notes.notes}


def test_a_tied_table_is_one_table(cli: Cli, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tied=True, embedding_bits=8)
    manifest = exported(folder, tmp_path / "onnx")
    assert manifest["weights"]["lm_head"]["bits"] == 8
    assert (manifest["notes"], manifest["check"]["largest_difference"] < 1e-5) == ([], True)
    data = (tmp_path / "onnx/model.onnx.data").stat().st_size
    assert data < 60_000  # 128 x 64 floats once would be 32,768 bytes more
    refused = one_line(cli("export", folder, tmp_path / "again", "--lm-head-bits", "8"))
    assert "holds its output head as int8 group 32 symmetric, which the graph takes as it is; leave it out" in refused
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["dynamo", "genai"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "given",
    [
        {"lm_head_bits": 4},
        {"lm_head_bits": 4, "offsets": "float"},
        {"lm_head_bits": 4, "symmetric": False},
        {"bits": 8, "lm_head_bits": 8, "symmetric": False},
        {"lm_head_bits": 8, "activations": "int8"},
    ],
    ids=str,
)
def test_every_kind_of_zero_point_in_both_graphs(
    graph: str, precision: str, given: dict[str, Any], tmp_path: Path
) -> None:
    manifest = exported(checkpoint(tmp_path, tied=True, **given), tmp_path / "onnx", graph=graph, precision=precision)
    assert manifest["weights"]["lm_head"]["bits"] == given["lm_head_bits"]


@pytest.mark.slow
def test_an_embedding_of_its_own_becomes_floats(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tied=False, embedding_bits=8, lm_head_bits=4)
    manifest = exported(folder, tmp_path / "onnx")
    assert manifest["weights"]["lm_head"]["bits"] == 4
    assert manifest["notes"] == ["The embedding's codes become floats: a graph shares those of an output head alone"]
    alone = swquant.compress(tmp_path / "model", tmp_path / "e", prompt=PROMPT, block="32", embedding_bits=8).path
    assert exported(alone, tmp_path / "head", lm_head_bits=8)["weights"]["lm_head"]["bits"] == 8
