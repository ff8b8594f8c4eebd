"""Real offsets in an ONNX folder: it gives what an independent decoder reads from it, with our library and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.exported import SETTINGS, check_parity
from support.onnx_decoder import decoded
from support.tiny_models import save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from swquant.detect import pipeline as detection
from swquant.models.onnx_model import OnnxModel

onnxruntime = pytest.importorskip("onnxruntime")
IDS = torch.randint(2, 128, (1, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is tied to the embedding."""
    folder = tmp_path_factory.mktemp("offsets") / "model"
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=96, tie_word_embeddings=True)
    return save_model(model, folder)


def logits(folder: Path, *, stock: bool = False) -> np.ndarray:
    path = folder / "model.onnx"
    if stock:
        model = OnnxModel(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), None)
    else:
        model = OnnxModel.open(path, None)
    return model.step(IDS.numpy(), model.empty_past(1))[0]


@pytest.mark.parametrize(("bits", "head"), [(4, 0), (4, 4), (3, 8), (2, 0)])
def test_the_folder_is_what_its_bytes_say(
    bits: int, head: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "find_folds", lambda *_: ())  # norms as they are: what is left compares by name
    options = {**SETTINGS, "bits": bits, "lm_head_bits": head}
    manifest = swquant.compress(source, tmp_path / "out", format="onnx", **options).manifest
    assert manifest["compression"]["options"]["offsets"] == "byte"
    weights = decoded(tmp_path / "out")
    assert len(weights) == manifest["operators"]["swquant::LinearNBits"] == 14 + bool(head)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(torch.from_numpy(weight))
        expected = model(input_ids=IDS).logits.numpy()
    for found in (logits(tmp_path / "out"), logits(tmp_path / "out", stock=True)):
        assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)


def test_the_builders_graph_holds_the_same_weights(source: Path, tmp_path: Path) -> None:
    graphs = [
        swquant.compress(source, tmp_path / graph, format="onnx", graph=graph, accuracy_level=0, **SETTINGS).path
        for graph in ("dynamo", "genai")
    ]
    first, *others = (logits(folder, stock=stock) for folder in graphs for stock in (False, True))
    assert all(np.abs(other - first).max() < 1e-4 * np.ptp(first) for other in others)


@pytest.mark.slow
def test_level_4_stays_close(source: Path, tmp_path: Path) -> None:
    """With our library and without it, where the offsets are multiplied in float."""
    exact, rounded = (
        swquant.compress(source, tmp_path / f"{level}", format="onnx", accuracy_level=level, **SETTINGS).path
        for level in (0, 4)
    )
    expected = logits(exact)
    for stock in (False, True):
        assert 0 < np.abs(logits(rounded, stock=stock) - expected).max() < 0.02 * np.ptp(expected)


def test_a_checkpoint_with_float_offsets_is_exported_as_it_is(source: Path, tmp_path: Path) -> None:
    checkpoint = swquant.compress(source, tmp_path / "out", offsets="float", **SETTINGS).path
    check_parity(checkpoint, swquant.export(checkpoint, tmp_path / "onnx").path)
    weights = decoded(tmp_path / "onnx")
    assert len(weights) == 14


@pytest.mark.slow
def test_codes_are_better_than_integers_at_the_size(source: Path, tmp_path: Path) -> None:
    text = " ".join(f"t{index}" for index in range(3, 90))
    results = {}
    for offsets, block in (("byte", "32"), ("none", "32"), ("none", "16")):
        settings = {**SETTINGS, "block": block, "offsets": offsets}
        manifest = swquant.compress(
            source, folder := tmp_path / f"{offsets}{block}", format="onnx", **settings
        ).manifest
        nbytes = sum(record["bytes"] for record in manifest["weights"].values())
        results[offsets, block] = nbytes, swquant.evaluate(folder, text, source).kl
    # Two bytes of a block, as for a scale in half, but for rows of only 64 inputs, which have one more.
    assert results["byte", "32"][0] < 1.05 * results["none", "32"][0]
    assert results["byte", "32"][1] < 0.8 * results["none", "32"][1]
    assert results["byte", "32"][0] < results["none", "16"][0]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "byte"),
        ({"preset": "fast"}, "none"),
        ({"symmetric": False}, "none"),
        ({"bits": 8}, "none"),
        ({"block": "tensor"}, "none"),
        ({"offsets": "none"}, "none"),
        ({"offsets": "float"}, "float"),
        ({"bits_budget": 4.5}, "byte"),
        ({"activations": "int8"}, "byte"),
    ],
    ids=str,
)
def test_which_offsets_a_folder_has(options: dict, kind: str, source: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "outliers"}
    planned = swquant.plan(source, format="onnx", **{**settings, **options})
    assert planned.prepared.plan.options.offsets == kind


def test_a_checkpoint_cannot_hold_bytes(source: Path, tmp_path: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="--offsets byte: format checkpoint holds none or float"):
        swquant.compress(source, tmp_path / "out", offsets="byte", **SETTINGS)
    assert not (tmp_path / "out").exists()
