"""A GGUF file whose tensors are rounded by other processes or on another device: the same joint as a checkpoint's."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.gguf_models import PROMPT, save_byte_level, save_gguf_model
from support.pretended import pretended_gpu
from support.tiny_models import plant, tiny_model

import swquant
from calibrationless import loops
from swquant import api
from swquant.cluster import workers
from swquant.cluster.workers import Workers
from swquant.models import devices

OPTIONS: dict[str, Any] = {"format": "gguf", "prompt": PROMPT}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a super weight, and rows of 96 that no k-quant takes beside rows of 256."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    model = tiny_model("llama", vocab_size=384, hidden_size=96, intermediate_size=256, num_hidden_layers=2)
    plant(model)
    model.save_pretrained(folder)
    save_byte_level(folder)
    return folder


class Pickled:
    """A team in this process: whatever it is given goes through pickle, as Ray would have it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def everywhere(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        return {"here": function(*arguments)}

    def in_order(
        self, function: Callable[..., Any], shared: Any, tasks: Iterable[Any], nbytes: Callable[[Any], int]
    ) -> Iterator[Any]:
        for task in tasks:
            assert nbytes(task) > 0
            sent, given, to = _through_pickle((task, shared, function))
            self.done.append(task[0].name)
            yield task, _through_pickle(to(given, *sent))


def _through_pickle(value: Any) -> Any:
    import pickle

    return pickle.loads(pickle.dumps(value))


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> Pickled:
    made = Pickled()

    @contextmanager
    def team(asked: Workers) -> Iterator[Pickled | None]:
        yield None if asked.here else made

    monkeypatch.setattr(api, "team", team)
    monkeypatch.setattr(workers.Workers, "check", lambda _: None)
    return made


@pytest.mark.parametrize("options", [{}, {"type": "Q8_0", "embedding_type": "Q6_K"}], ids=str)
def test_what_other_processes_round_are_the_bytes_of_this_one(
    planted: Path, pickled: Pickled, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "embedding_type" in options:
        planted = Path(tmp_path / "wide")
        save_gguf_model("llama", planted)
    one = swquant.compress(planted, tmp_path / "one.gguf", **OPTIONS, **options)
    assert pickled.done == []
    two = swquant.compress(planted, tmp_path / "two.gguf", workers=2, **OPTIONS, **options)
    assert two.path.read_bytes() == one.path.read_bytes()
    assert two.manifest == one.manifest
    assert len(pickled.done) == len(one.manifest["tensors"])


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs swquant[ray]")
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_two_workers_give_the_bytes_of_one(planted: Path, tmp_path: Path, preset: str) -> None:
    options = {**OPTIONS, "preset": preset, **({"texts": 2} if preset == "best" else {})}
    one = swquant.compress(planted, tmp_path / "one.gguf", **options)
    two = swquant.compress(planted, tmp_path / "two.gguf", workers=2, **options)
    assert two.path.read_bytes() == one.path.read_bytes()


def test_a_mixture_on_workers(tmp_path: Path, pickled: Pickled) -> None:
    save_gguf_model("mixtral", tmp_path / "model")
    options = {**OPTIONS, "preset": "fast", "type": "Q4_0"}
    one = swquant.compress(tmp_path / "model", tmp_path / "one.gguf", **options)
    two = swquant.compress(tmp_path / "model", tmp_path / "two.gguf", workers=2, **options)
    assert two.path.read_bytes() == one.path.read_bytes()


def test_another_device_writes_a_file_as_good(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000, 100_000))  # the model stays, its tensors go
    here = swquant.compress(planted, tmp_path / "here.gguf", device="cpu", **OPTIONS)
    seen = []
    run_loop = loops.run_loop
    monkeypatch.setattr(loops, "COMPILED", frozenset({"cpu"}))
    for module in ("affine", "search", "super_blocks"):
        monkeypatch.setattr(
            importlib.import_module(f"calibrationless.{module}"),
            "run_loop",
            lambda name, device, *rest: (seen.append((name, device.type)), run_loop(name, device, *rest)),
        )
    with pretended_gpu() as gpu:
        monkeypatch.setattr(devices, "device_for", lambda _: gpu)
        there = swquant.compress(planted, tmp_path / "there.gguf", device="cuda", **OPTIONS)
    assert {name for name, device in seen if device == gpu.type} == {"search_lines", "settle_super_blocks"}
    assert there.manifest["tensors"] == here.manifest["tensors"]
    options = [json.loads(gguf.GGUFReader(one.path).fields["swquant.options"].contents()) for one in (here, there)]
    assert [one["device"] for one in options] == ["cpu", gpu.type]
    for ours, theirs in zip(there.manifest["super_weights"], here.manifest["super_weights"], strict=True):
        assert ours["without_sidecar"] == pytest.approx(theirs["without_sidecar"], rel=1e-3)
