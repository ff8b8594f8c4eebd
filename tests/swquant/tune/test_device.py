"""`tune --device`: what is trained lies where it is told to, and what comes back is written from the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretended import GPU
from support.tiny_models import sample_text

import swquant
from calibrationless import Blocks, Group, Points, quantize, quantize_affine
from exporters.errors import SwquantError
from swquant.models import devices
from swquant.training.patched_linear import DenseWeight, PatchedLinear
from swquant.training.scales import ScaledWeight
from swquant.tune.session import Session

Pair = tuple[Path, Path]


@pytest.mark.parametrize("offsets", [False, True])
def test_a_layer_computes_there_what_it_computes_here(gpu: torch.device, offsets: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(12, 64), torch.randn(5, 64)
    quantized = quantize_affine(weight, Group(32), 4) if offsets else quantize(weight, Group(32), 4)
    points = Points.at(weight, torch.tensor([3, 7]), torch.tensor([1, 60]))
    index = torch.tensor([0], dtype=torch.int32)
    blocks = Blocks(index, index, torch.randn(1, 8, 8))
    found = []
    for device in (torch.device("cpu"), gpu):
        layer = PatchedLinear(ScaledWeight(quantized, (points,)).on(device), None, blocks).to(device)
        loss = layer(x.to(device)).square().sum()
        assert loss.device.type == device.type
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        found.append([item.cpu() for item in (loss, *grads)])
        assert layer.trained(torch.float32).values.device.type == "cpu"
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here)


def test_a_dense_weight_under_blocks_stays_there(gpu: torch.device) -> None:
    index = torch.tensor([1], dtype=torch.int32)
    blocks = Blocks(index, index, torch.randn(1, 8, 8))
    weight = torch.randn(16, 16)
    here = PatchedLinear(DenseWeight(weight), None, blocks)
    there = PatchedLinear(DenseWeight(weight.to(gpu)), None, blocks).to(gpu)
    x = torch.randn(3, 16)
    torch.testing.assert_close(there(x.to(gpu)).cpu(), here(x))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["blocks", "both"])
def test_a_run_on_another_device_recovers_as_much(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, train: str
) -> None:
    original, checkpoint = pair
    options: dict[str, Any] = {"train": train, "budget": "1bits", "block": 16, "steps": 4, "window": 32, "warmup": 2}
    options |= {
        "lr": "3e-3",
        "against": original,
        "text": sample_text(32 * 12),
    }  # a cache is made in C++, for known devices
    here = swquant.tune(checkpoint, tmp_path / "here", **options, device="cpu")
    seen = set()
    loss = Session.loss
    monkeypatch.setattr(Session, "loss", lambda self, batch: seen.add(self.model.device.type) or loss(self, batch))
    monkeypatch.setattr(devices, "device_for", lambda _: gpu)
    there = swquant.tune(checkpoint, tmp_path / "there", **options, device="cuda")
    assert here is not None
    assert there is not None
    assert seen == {GPU.type}
    for key in ("held_out_before", "held_out_after"):
        assert there.record[key] == pytest.approx(here.record[key], rel=0.01)  # type: ignore[literal-required]
    assert swquant.verify(there.path) == []


def test_what_is_no_device_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match="device 'tpu' is not one of: auto, cpu, cuda"):
        swquant.tune(tmp_path / "none", tmp_path / "out", device="tpu")
