"""`adapt --device`: the model runs where it is told to, and decisions and sets are those of the CPU, and lie there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli
from support.pretended import GPU
from support.tasks import QUICK, file_of, text_of

import swquant
from calibrationless import CPU
from exporters.errors import SwquantError
from exporters.pool_file import StoredSet
from swquant.adapt.decide import decide
from swquant.adapt.learning import learn
from swquant.adapt.options import AdaptOptions
from swquant.adapt.pipeline import open_workshop
from swquant.adapt.plan import AdaptPlan, make_plan
from swquant.adapt.workshop import Workshop
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models import devices
from swquant.models.routing import choose, router_of
from swquant.progress import silent
from swquant.training.data import text_windows
from swquant.training.loop import State
from swquant.tune.session import Session


def workshop(
    checkpoint: CompressedCheckpoint, device: torch.device, path: Path, **changes: Any
) -> tuple[AdaptPlan, Workshop]:
    plan = make_plan(checkpoint, [("middle", path)], AdaptOptions(**{**QUICK, "steps": 8, "soft": 0.5, **changes}))
    return plan, open_workshop(plan, None, silent, device)


def test_what_is_decided_there_is_what_is_decided_here(gpu: torch.device, pool: Path, tmp_path: Path) -> None:
    found = []
    with CompressedCheckpoint(pool) as checkpoint:
        ids = text_windows(checkpoint, text_of("high", 9), QUICK["window"]).sequences[0][0]
        for device in (CPU, gpu):
            plan, shop = workshop(checkpoint, device, file_of(tmp_path, "middle"))
            assert shop.model.device.type == device.type
            decision = decide(shop, shop.session(*plan.tasks[0].corpus.split()), "middle", 2)
            assert choose(shop.keys(), shop.model, ids) == "high"
            found.append(decision)
    here, there = found
    assert (there["action"], there["set"], there["control"]) == (here["action"], here["set"], here["control"])
    for name, record in here["sets"].items():
        assert there["sets"][name] == pytest.approx(record, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("changes", [{"policy": "grow"}, {"threshold": "1"}], ids=str)
def test_what_is_learned_there_comes_back(
    gpu: torch.device, pool: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """In a set of its own, and in an old one."""
    found: list[StoredSet] = []
    with CompressedCheckpoint(pool) as checkpoint:
        for device in (CPU, gpu):
            plan, shop = workshop(checkpoint, device, file_of(tmp_path, "middle"), **changes)
            found.append(learn(plan, shop, plan.tasks[0], 2, State(tmp_path / "state", ""), silent))
    here, there = (stored.record["tasks"]["middle"] for stored in found)
    assert there["before"] == pytest.approx(here["before"], rel=1e-4)
    assert there["after"] == pytest.approx(here["after"], rel=0.01)
    assert there["after"] < there["before"]
    tensors = found[1].tensors()
    assert set(tensors) == set(found[0].tensors())
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


@pytest.mark.slow
def test_a_run_on_another_device_writes_a_pool(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, pool: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "device_for", lambda _: gpu)
    seen: set[str] = set()
    loss = Session.loss
    monkeypatch.setattr(Session, "loss", lambda self, batch: seen.add(self.model.device.type) or loss(self, batch))
    options: dict[str, Any] = {**QUICK, "device": "cuda"}
    result = swquant.adapt(pool, tmp_path / "out", {"middle": file_of(tmp_path, "middle")}, **options)
    assert seen == {GPU.type}
    assert swquant.verify(result.path) == []
    routed = swquant.load(result.path, task="auto", dtype=torch.float32, device=gpu)  # type: ignore[arg-type]
    with CompressedCheckpoint(result.path) as checkpoint:
        ids = text_windows(checkpoint, text_of("middle", 9), 32).batch([0, 1]).ids
    with torch.no_grad():
        there = routed(ids.to(gpu), use_cache=False).logits.cpu()
        here = swquant.load(result.path, task="auto", dtype=torch.float32)(ids, use_cache=False).logits
    assert router_of(routed).chosen == ["middle"] * 2  # type: ignore[union-attr]
    torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)


def test_a_device_that_is_none_is_refused_before_anything_is_opened(cli: Cli, tmp_path: Path) -> None:
    ran = cli("adapt", tmp_path / "none", tmp_path / "out", "--task", "a=b", "--device", "tpu")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "device 'tpu' is not one of: auto, cpu, cuda" in ran.err
    with pytest.raises(SwquantError, match="device 'tpu' is not one of"):
        swquant.adapt(tmp_path / "none", tmp_path / "out", {"a": "b"}, device="tpu")
