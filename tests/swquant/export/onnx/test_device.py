"""The check after an export, with what it compares with from another device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pretended import GPU, pretended_gpu

import swquant
from swquant.export.onnx import pipeline
from swquant.models import devices

pytest.importorskip("onnxruntime")


def test_the_checkpoint_answers_on_the_device_and_the_graph_is_made_on_the_cpu(
    checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    places, make = [], pipeline.make_reference
    monkeypatch.setattr(
        pipeline, "make_reference", lambda model, prompt: places.append(model.device) or make(model, prompt)
    )
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pretended_gpu() as gpu:
            monkeypatch.setattr(devices, "device_for", lambda _: gpu)
            written = swquant.export(checkpoint, tmp_path / "out", device="cuda")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert places == [GPU]
    assert written.manifest["check"]["largest_difference"] < written.manifest["check"]["tolerance"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


def test_a_gpu_that_is_not_there_is_refused_before_the_checkpoint_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(swquant.SwquantError, match="--device cuda: PyTorch .*; take --device cpu"):
        swquant.export(tmp_path / "no checkpoint", tmp_path / "out", device="cuda")
