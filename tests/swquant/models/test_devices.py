"""`--device`: what is asked for is there or refused before any work, and what ran on a GPU comes back to the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretended import GPU, pretended_gpu
from support.tiny_models import PROMPT, Planted

import swquant
from calibrationless import loops
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.detect import texts
from swquant.detect.own_text import self_text
from swquant.detect.pipeline import find_super_weights, probed_model
from swquant.models import devices
from swquant.models.devices import device_for, place_for
from swquant.progress import silent


def pretend(monkeypatch: pytest.MonkeyPatch, count: int = 1, free: int = 1 << 40) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    pretend_memory(monkeypatch, free)


def pretend_memory(monkeypatch: pytest.MonkeyPatch, free: int = 1 << 40) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))


def test_auto_takes_the_first_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("auto") == torch.device("cpu")
    pretend(monkeypatch, 2)
    assert device_for("auto") == device_for("cuda") == torch.device("cuda", 0)
    assert device_for("cuda:1") == torch.device("cuda", 1)
    assert device_for("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "mps"])
def test_what_is_no_device_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(SwquantError, match="is not one of: auto, cpu, cuda, cuda:1"):
        device_for(name)


@pytest.mark.parametrize("call", ["detect", "compress", "plan", "evaluate", "generate", "study"])
def test_a_gpu_that_is_not_there_is_refused_before_the_model_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = {"evaluate": ("text",), "generate": ("text",), "study": ("text",)}.get(call, ())
    with pytest.raises(
        SwquantError, match=r"--device cuda: PyTorch .*; take --device cpu, or install PyTorch for CUDA"
    ):
        getattr(swquant, call)(tmp_path / "no model here", *text, device="cuda")


@pytest.mark.parametrize(("count", "there"), [(1, "cuda:0 alone"), (3, "cuda:0 to cuda:2")])
def test_a_gpu_of_a_number_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, there: str
) -> None:
    pretend(monkeypatch, count)
    with pytest.raises(SwquantError, match=f"--device cuda:7: there is no such GPU, but {there}"):
        device_for("cuda:7")


def test_a_model_that_does_not_fit_on_the_gpu_runs_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, planted_llama: Planted
) -> None:
    pretend(monkeypatch, free=100_000)
    with open_checkpoint(planted_llama.folder) as checkpoint:
        place, said = place_for(checkpoint, torch.float32, torch.device("cuda", 0))
        assert place == torch.device("cpu")
        assert "on the CPU: it takes" in said
        assert "cuda:0 has 100" in said
        with probed_model(checkpoint, False, torch.device("cuda", 0)) as model:
            assert model.device.type == "cpu"


def test_detection_on_another_device_finds_the_same(monkeypatch: pytest.MonkeyPatch, planted_llama: Planted) -> None:
    pretend_memory(monkeypatch)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with open_checkpoint(planted_llama.folder) as checkpoint:
            here = find_super_weights(checkpoint, PROMPT, folds=True)
            with pretended_gpu() as gpu:
                there = find_super_weights(checkpoint, PROMPT, folds=True, device=gpu)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    ours, theirs = there.detection.super_weights, here.detection.super_weights
    assert [(w.name, w.row, w.col, w.role) for w in ours] == [(w.name, w.row, w.col, w.role) for w in theirs]
    assert type(there.probe.logits) is torch.Tensor
    for name, record in here.probe.linears.items():  # another kernel for attention: other last bits
        torch.testing.assert_close(there.probe.linears[name].energy, record.energy)


def test_what_its_own_text_says_is_found_out_there(monkeypatch: pytest.MonkeyPatch, planted_llama: Planted) -> None:
    pretend_memory(monkeypatch)
    monkeypatch.setattr(texts, "LENGTH", 24)
    names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in (0, 1) for kind in ("gate", "down")]
    exponents = torch.arange(64) % 3 - 1

    def statistics(device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
        with self_text(
            checkpoint, found, names, texts=5, text_from=None, low_memory=False, seed=0, progress=silent, device=device
        ) as text:
            for name in names:
                ((order, upper), energy) = text.statistics(name, exponents if "gate" in name else None)
                yield order, upper, energy

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with open_checkpoint(planted_llama.folder) as checkpoint:
            found = find_super_weights(checkpoint, PROMPT)
            here = list(statistics(torch.device("cpu")))
            with pretended_gpu() as gpu:
                there = list(statistics(gpu))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for ours, theirs in zip(here, there, strict=True):
        assert {item.device for item in theirs} == {GPU}
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(other.cpu(), mine, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"preset": "best", "texts": 3}], ids=str)
def test_compress_on_another_device_writes_a_checkpoint_as_good(
    monkeypatch: pytest.MonkeyPatch, planted_llama: Planted, tmp_path: Path, options: dict[str, Any]
) -> None:
    pretend_memory(monkeypatch)
    monkeypatch.setattr(texts, "LENGTH", 24)
    monkeypatch.setattr(loops, "COMPILED", frozenset())
    here = swquant.compress(planted_llama.folder, tmp_path / "here", prompt=PROMPT, device="cpu", **options)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pretended_gpu() as gpu:
            monkeypatch.setattr(devices, "device_for", lambda _: gpu)
            there = swquant.compress(planted_llama.folder, tmp_path / "there", prompt=PROMPT, device="cuda", **options)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert (here.manifest["device"], there.manifest["device"]) == ("cpu", GPU.type)
    assert swquant.verify(there.path) == []
    for name, record in here.manifest["tensors"].items():
        assert there.manifest["tensors"][name]["bytes"] == record["bytes"]
        error = there.manifest["tensors"][name].get("relative_error", 0)
        assert error == pytest.approx(record.get("relative_error", 0), rel=0.01)
