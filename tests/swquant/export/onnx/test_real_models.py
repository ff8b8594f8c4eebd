"""Real models in ONNX Runtime: the checkpoint's logits and its next 64 tokens, on stock runtimes and on our library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.real_models import GEMMA, SMOLLM2, real_model

import swquant
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.loading import build_model
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import library_path, open_session

pytest.importorskip("onnxruntime")
MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA}
PROMPT = "The Eiffel Tower was built"
TOKENS = 64


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain rounding with outliers: the export does not care how scales were found."""
    source = real_model(MODELS[request.param])
    out = tmp_path_factory.mktemp(request.param) / "w4"
    return swquant.compress(source, out, block="32", preset="fast", outliers=0.0005).path


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["dynamo", "genai"])
def test_the_same_logits_and_the_same_64_tokens(checkpoint: Path, graph: str, tmp_path: Path) -> None:
    folder = swquant.export(checkpoint, tmp_path / "onnx", graph=graph).path
    with CompressedCheckpoint(checkpoint, unrounded=True) as opened, torch.no_grad():
        reference = build_model(opened, torch.float32)
        ids = torch.tensor([opened.tokenizer()(PROMPT)["input_ids"]])
        greedy = reference.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = reference(input_ids=greedy).logits.numpy()
    span = np.ptp(expected)
    for library in {False, library_path() is not None}:
        model = OnnxModel(open_session(folder / "model.onnx", library=library), None)
        logits, _ = model.step(greedy.numpy(), model.empty_past(1))
        assert np.abs(logits - expected).max() < 1e-4 * span
        assert model.generate(ids, max_new_tokens=TOKENS).tolist() == greedy.tolist()
