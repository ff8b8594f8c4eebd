"""Exported folders on a CUDA device: the logits of the CPU. `make test-gpu` runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import first_provider, open_session

pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(("graph", "precision"), [("dynamo", "fp32"), ("genai", "fp32"), ("genai", "fp16")])
def test_the_same_logits_on_a_device(graph: str, precision: str, tmp_path: Path) -> None:
    if first_provider() != "CUDAExecutionProvider":
        pytest.skip("no CUDA device, or an onnxruntime without CUDA")
    if graph == "genai":
        pytest.importorskip("onnxruntime_genai")
    save_model(tiny_model("llama", num_hidden_layers=2, intermediate_size=96), tmp_path / "model")
    checkpoint = swquant.compress(tmp_path / "model", tmp_path / "out", prompt=PROMPT, block="32", outliers=0.01).path
    path = swquant.export(checkpoint, tmp_path / "onnx", graph=graph, precision=precision).path / "model.onnx"
    on_device, on_cpu = (OnnxModel(open_session(path, device=device), None) for device in ("cuda", "cpu"))
    ids = np.arange(2, 42, dtype=np.int64)[None]
    past, expected_past = on_device.empty_past(1), on_cpu.empty_past(1)
    for piece in (ids[:, :39], ids[:, 39:]):  # the runtime's Gemm, then the kernel for few rows
        logits, past = on_device.step(piece, past)
        expected, expected_past = on_cpu.step(piece, expected_past)
        limit = (2e-3 if precision == "fp32" else 2e-2) * np.ptp(expected.astype(np.float32))
        assert np.abs(logits.astype(np.float32) - expected.astype(np.float32)).max() < limit
