"""benchmarks/tune.py: cells are made one by one and gone on from, several files make one table, and peers are equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import PROJECT
from support.pretended import pretended_gpu
from support.tiny_models import PROMPT, sample_text, save_model, tiny_model

import swquant

sys.path.insert(0, str(PROJECT / "benchmarks"))

import tune
from tuning import peers, report, results
from tuning.results import Case
from tuning.world import World

from swquant.training.model import trainable_model

CASE = Case("recovery", "1bits", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    original = save_model(tiny_model("llama", num_hidden_layers=2), path / "m", torch.bfloat16)
    swquant.compress(original, path / "c", prompt=PROMPT, block="32", bits=3)
    (path / "test.txt").write_text(sample_text(120))
    return path


def ran(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *more: object) -> dict[str, Any]:
    """Cells of a run."""
    typed = [
        "tune.py", folder / "c", folder / "m", "--json", folder / name, "--steps", 2, "--texts", 8, "--window", 24,
        "--block", 16, "--warmup", 1, "--windows", 2, "--test-window", 32, "--lines", 8, "--budgets", "1bits",
        "--test", folder / "test.txt", "--own-text", folder / "own.safetensors", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, typed), *map(str, more)])
    tune.main()
    return json.loads((folder / name).read_text())["cells"]


def cell(method: str, rate: float, seed: int, held: float | None, **more: Any) -> dict[str, Any]:
    facts = {"task": CASE.task, "budget": CASE.budget, "pool": CASE.pool, "method": method, "rate": rate, "seed": seed}
    return {**facts, "held_out": held, "bytes": 10, "seconds": 1.0, "peak": 0, "kl": held, "wiki": 3.0, **more}


def keyed(*cells: dict[str, Any]) -> dict[str, Any]:
    return {CASE.key(item["method"], item["rate"], item["seed"]): item for item in cells}


def test_a_grid_grows_where_its_best_is_at_an_end() -> None:
    grid = (3e-4, 1e-3, 3e-3)
    found = keyed(cell("lora", 3e-4, 0, 3.0), cell("lora", 1e-3, 0, 2.0))
    assert results.rates_to_try(found, CASE, "lora", grid, 2) == [3e-3]
    found |= keyed(cell("lora", 3e-3, 0, 1.0))
    assert results.rates_to_try(found, CASE, "lora", grid, 2) == [1e-2]
    assert results.rates_to_try(found, CASE, "lora", grid, 0) == []
    found |= keyed(cell("lora", 1e-2, 0, None))  # diverged
    assert results.best_rate(found, CASE, "lora") == 3e-3
    assert results.rates_to_try(found, CASE, "lora", grid, 2) == []
    assert results.best_rate(found, CASE, "dora") is None


def test_ranks_fill_what_they_may() -> None:
    shapes = {f"layer{number}": (64, 32) for number in range(10)}
    assert set(peers.fitting_ranks(shapes, 5).values()) == {1}
    for numbers in (960, 1500, 2500):
        ranks = peers.fitting_ranks(shapes, numbers)
        assert numbers - 2 * 96 < sum(rank * 96 for rank in ranks.values()) <= numbers
        assert max(ranks.values()) - min(ranks.values()) <= 1


def test_tables_are_made_of_what_is_there(tmp_path: Path) -> None:
    places = {"v_proj": {"0": [3, 4], "5": [1, 4]}, "up_proj": {"0": [0, 8], "5": [0, 8]}}
    found = keyed(
        cell("recovery", 1e-3, 0, 0.5, places=places), cell("recovery", 1e-3, 1, 0.7, places=places),
        cell("recovery", 3e-3, 0, 0.9), cell("lora", 1e-3, 0, None),
    )  # fmt: skip
    found["recovery 2bits"] = {**cell("recovery", 1e-3, 0, 0.4), "budget": "2bits"}
    found["recovery before"] = {"held_out": 2.0, "kl": 2.0, "wiki": 3.5}
    found |= {
        f"speed {name}": {
            "method": name,
            "precision": "float32",
            "budget": "1bits",
            "seconds": seconds,
            "peak": 0,
            "parameters": 9,
        }
        for name, seconds in (("blocks", 0.2), ("lora", 0.25))
    }
    text = report.tables(found)
    assert [path.stat().st_size > 1000 for path in report.draw(found, tmp_path, "c")] == [True]
    assert "| blocks | 9 | 200.0 |  | 1.25 |  |" in text
    assert "| recovery | 10 | 0.001 (an end of what was tried) | 2 | 0.6000 ± 0.1414 |" in text
    assert "| lora |" not in text.partition("## Speed")[0]
    assert "| recovery | 0.6000 ± 0.1414 (0.00 MB) | 0.4000 (0.00 MB) |" in text
    assert "| v_proj | 100.0% | 33.3% | 3.00 | 3 | 0 | 1 |" in text


@pytest.mark.slow
def test_blocks_and_scales_are_trained_and_gone_on_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chosen = ("--methods", "recovery", "scales", "full", "--rates", 1e-3, "--more", 0)
    cells = ran(monkeypatch, folder, "one.json", *chosen)
    assert len(cells) == 4
    start, best = cells["recovery before"], cells["recovery recovery 1bits all 0.001 0"]
    assert best["kl"] < start["kl"]
    assert cells["recovery full 1bits all 0.001 0"]["bytes"] > 4 * best["bytes"]
    assert sum(pair[0] for kind in best["places"].values() for pair in kind.values()) * (2 * 256 + 8) == best["bytes"]
    capsys.readouterr()
    more = ran(monkeypatch, folder, "one.json", *chosen, "--seeds", 2)
    assert list(more)[:4] == list(cells)
    assert len(more) == 7
    assert "recovery recovery 1bits all 0.001 0:" not in capsys.readouterr().out


@pytest.mark.slow
def test_tasks_are_learned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("--methods", "gradient", "--rates", 3e-3, "--more", 0, "--from", "attention")
    cells = ran(monkeypatch, folder, "tasks.json", *chosen, "--task", "python", "dates")
    for task in ("python", "dates"):
        start, after = cells[f"{task} before"], cells[f"{task} gradient 1bits attention 0.003 0"]
        assert after["nll"] < start["nll"]
        assert after["wiki"] != start["wiki"]
        assert set(after["places"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("method", ["lora", "dora", "miss", "shira", "shira-blocks", "supertuning"])
def test_peers_take_the_bytes_of_the_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    if tune.missing(method):
        pytest.skip("not in the installed peft")
    chosen = ("--methods", "recovery", method, "--rates", 3e-3, "--more", 0)
    cells = ran(monkeypatch, folder, f"{method}.json", *chosen)
    ours, theirs = (cells[f"recovery {name} 1bits all 0.003 0"] for name in ("recovery", method))
    assert 0.7 * ours["bytes"] < theirs["bytes"] <= ours["bytes"]
    assert theirs["kl"] != cells["recovery before"]["kl"]
    if method == "shira-blocks":  # the same points, the same steps
        assert theirs["parameters"] == ours["parameters"]
        assert theirs["kl"] == pytest.approx(ours["kl"], rel=1e-4)


@pytest.mark.slow
def test_another_device_finds_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not where it belongs fails, which leaves its cell out."""
    methods = tune.usable([*tune.METHODS])
    chosen = ("--methods", *methods, "--rates", 1e-3, "--more", 0, "--task", "recovery", "dates")
    here = ran(monkeypatch, folder, "here.json", *chosen)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended GPU")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with pretended_gpu() as device:
            monkeypatch.setattr(tune, "device_for", lambda _: device)
            # copy.deepcopy makes tensors without asking the device that is none
            monkeypatch.setattr(World, "fresh", lambda self: trainable_model(self.checkpoint, self.device))
            there = ran(monkeypatch, folder, "there.json", *chosen)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert set(there) == set(here)
    for key, cell in here.items():
        assert there[key]["held_out"] == pytest.approx(cell["held_out"], rel=1e-3), key


@pytest.mark.slow
def test_speed_is_measured_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cells = ran(monkeypatch, folder, "speed.json", "--speed", "--timed", 2)
    assert {"speed blocks 1bits float32", "speed full 1bits bfloat16"} <= set(cells)
    assert "## Speed, 1bits, bfloat16" in capsys.readouterr().out
