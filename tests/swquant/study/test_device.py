"""A study whose model is on another device: the same findings, and its own place in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretended import pretended_gpu
from support.study_world import OPTIONS, World

import swquant
from swquant.models import devices
from swquant.study import measuring


def numbers(value: Any) -> list[float]:
    """Every number of a record, in its order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


class _Here:
    """A pool without threads: the pretended GPU is there in the thread that pretends alone."""

    def __init__(self, _: int) -> None: ...

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@pytest.mark.slow
def test_a_study_on_another_device_finds_the_same(
    planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    text, options = planted.text.read_text(), {**OPTIONS, "quick": True, "limit": 2}
    here = swquant.study(planted.folder, text, tmp_path / "study", device="cpu", **options)
    measured = len(list((tmp_path / "study" / "cache").glob("*.safetensors")))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pretended_gpu() as gpu:
            monkeypatch.setattr(devices, "device_for", lambda _: gpu)
            monkeypatch.setattr(measuring, "ThreadPoolExecutor", _Here)
            there = swquant.study(planted.folder, text, tmp_path / "study", device="cuda", **options)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert (here.record["device"], there.record["device"]) == ("cpu", gpu.type)
    assert len(list((tmp_path / "study" / "cache").glob("*.safetensors"))) == 2 * measured
    for ours, theirs in zip(there.record["sections"], here.record["sections"], strict=True):
        assert ours["agrees"] == theirs["agrees"], ours["name"]
        assert numbers(ours["tables"]) == pytest.approx(numbers(theirs["tables"]), rel=0.02, abs=2e-3), ours["name"]
