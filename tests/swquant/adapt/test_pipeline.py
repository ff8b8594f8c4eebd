"""`adapt`, from end to end on a tiny model: what it decides, what it keeps, and that it goes on after interruptions."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, document
from support.tasks import QUICK, file_of, text_of

import swquant
from exporters.pool_file import POOL, PoolFile, pool_path
from swquant.adapt import learning
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.training.data import text_windows
from swquant.tune.session import Session


def words(**changes: Any) -> list[str]:
    return [word for key, value in {**QUICK, **changes}.items() for word in (f"--{key}", str(value))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loss(folder: Path, task: str | None, text: str) -> float:
    """Nats per token."""
    return math.log(swquant.evaluate(folder, text, task=task, window=32, limit=4).perplexity)


def test_each_task_is_learned_and_the_base_stays(base: Path, pool: Path) -> None:
    manifest = swquant.inspect(pool)
    sets = manifest["pool"]["sets"]
    assert {name: list(record["tasks"]) for name, record in sets.items()} == {"low": ["low"], "high": ["high"]}
    for name, record in sets.items():
        task = record["tasks"][name]
        assert task["after"] < 0.9 * task["before"] == 0.9 * task["base"]
        assert record["bytes"] <= 0.125 * manifest["totals"]["quantized_weights"]
        unseen = text_of(name, 5)
        assert loss(pool, name, unseen) < 0.9 * loss(pool, None, unseen)
        assert loss(pool, "base", unseen) == loss(pool, None, unseen) == loss(base, None, unseen)
    assert swquant.verify(pool, loads=True) == []
    old, new = files(base), files(pool)
    changed = {name for name in new if new[name] != old.get(name)}
    assert changed == {"swquant/manifest.json", *(pool_path(name) for name in ("base", "low", "high"))}
    assert set(manifest["pool"]["angles"]) <= {"low high"}


def test_what_is_measured_is_what_is_loaded(pool: Path) -> None:
    """The loss that the record holds is that of the stored set, as every reader lays it."""
    record = swquant.inspect(pool)["pool"]["sets"]["low"]["tasks"]["low"]
    with CompressedCheckpoint(pool) as checkpoint:
        _, held = text_windows(checkpoint, text_of("low"), QUICK["window"]).split()
    model = swquant.load(pool, task="low", dtype=torch.float32)
    ids = held.batch(range(len(held))).ids
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    measured = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert measured == pytest.approx(record["after"], abs=2e-3)  # blocks are added to rounded weights


def test_a_task_that_was_there_is_reused_and_hurts_nothing(pool: Path, tmp_path: Path) -> None:
    again = file_of(tmp_path, "low", 7)
    result = swquant.adapt(pool, tmp_path / "out", {"again": again}, **QUICK)
    assert result.sets == {"again": "low"}
    record = result.manifest["pool"]["sets"]["low"]["tasks"]["again"]
    decision = record["decision"]
    assert decision["action"] == "reuse"
    assert "which serves it" in decision["reason"]
    assert decision["sets"]["low"]["recognised"] > 0.5 > decision["sets"]["high"]["recognised"]
    # by the formula alone it would be hindered more than by the base's own text
    assert decision["sets"]["low"]["excess"] > decision["sets"]["high"]["excess"]
    unseen = text_of("low", 5)
    assert loss(tmp_path / "out", "again", unseen) < loss(pool, "low", unseen) + 0.02
    assert record["after"] <= record["before"]
    old, new = files(pool), files(tmp_path / "out")
    assert new[pool_path("high")] == old[pool_path("high")]


@pytest.mark.parametrize(("threshold", "action"), [("1", "reuse"), ("-1", "grow")])
def test_the_threshold_decides(pool: Path, tmp_path: Path, threshold: str, action: str) -> None:
    task = {"middle": file_of(tmp_path, "middle")}
    planned = swquant.adapt(pool, tmp_path / "out", task, dry_run=True, threshold=threshold, **QUICK)["middle"]
    assert planned["action"] == action
    result = swquant.adapt(pool, tmp_path / "out", task, threshold=threshold, **QUICK)
    assert result.manifest["pool"]["sets"][result.sets["middle"]]["tasks"]["middle"]["decision"] == planned
    assert len(result.manifest["pool"]["sets"]) == (2 if action == "reuse" else 3)


def test_what_is_learned_under_projection_forgets_less(pool: Path, tmp_path: Path) -> None:
    """The same steps in the same set, beside what its first task sees and without a thought for it."""
    task, unseen = {"middle": file_of(tmp_path, "middle")}, text_of("low", 5)
    forced = swquant.adapt(pool, tmp_path / "one", task, policy="one", drop=["high"], **QUICK)
    careful = swquant.adapt(pool, tmp_path / "careful", task, threshold="1", drop=["high"], **QUICK)
    assert forced.sets == careful.sets == {"middle": "low"}
    before = loss(pool, "low", unseen)
    assert loss(tmp_path / "careful", "low", unseen) - before < 0.5 * (loss(tmp_path / "one", "low", unseen) - before)


# --- resuming


@pytest.mark.parametrize("stage", [pytest.param("decide", marks=pytest.mark.slow), "second task, step 7"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    tasks = {task: file_of(tmp_path, task) for task in ("low", "high")}
    swquant.adapt(base, tmp_path / "whole", tasks, threshold="1", **QUICK)
    seen: list[int] = []
    real = Session.loss_of

    def interrupting(self: Session, step: int, part: int) -> torch.Tensor:
        seen.append(step)
        if len(seen) == QUICK["steps"] + 8:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, part)

    with monkeypatch.context() as patch:
        if stage == "decide":
            patch.setattr(learning, "decide", lambda *_: signal.raise_signal(signal.SIGINT))
        else:
            patch.setattr(Session, "loss_of", interrupting)
        with pytest.raises(KeyboardInterrupt):
            swquant.adapt(base, tmp_path / "out", tasks, threshold="1", **QUICK)
    assert not (tmp_path / "out").exists()
    if stage != "decide":
        assert (tmp_path / "out.adapting").exists()
        seen.clear()
        monkeypatch.setattr(Session, "loss_of", lambda self, step, part: seen.append(step) or real(self, step, part))
    swquant.adapt(base, tmp_path / "out", tasks, threshold="1", **QUICK)
    assert seen == ([] if stage == "decide" else [*range(7, QUICK["steps"])])
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.adapting").exists()


# --- sets that come and go


def test_a_set_goes_elsewhere_and_comes_back(cli: Cli, base: Path, pool: Path, tmp_path: Path) -> None:
    ran = cli("adapt", pool, tmp_path / "low.set", "--export-set", "low")
    assert ran.code == 0, ran.err
    dropped = document(cli("adapt", pool, tmp_path / "less", "--drop-set", "low", "--json"))["manifest"]
    assert list(dropped["pool"]["sets"]) == ["high"]
    assert pool_path("low") not in files(tmp_path / "less")
    unseen = text_of("low", 5)
    for folder in (tmp_path / "less", base):
        out = tmp_path / f"with-{folder.name}"
        ran = cli("adapt", folder, out, "--import-set", tmp_path / "low.set", *words())
        assert ran.code == 0, ran.err
        assert loss(out, "low", unseen) == loss(pool, "low", unseen)
    ran = cli("adapt", pool, tmp_path / "none", "--drop-set", "low", "--drop-set", "high")
    assert ran.code == 0, ran.err
    assert files(tmp_path / "none") == files(base)


def test_a_set_of_another_base_is_refused(cli: Cli, base: Path, pool: Path, tmp_path: Path) -> None:
    for there, said in ((True, "no set that swquant wrote, so it is not replaced"), (False, "exists already")):
        (tmp_path / "low.set").write_text("mine")
        with pytest.raises(swquant.SwquantError, match=said):
            swquant.export_set(pool, "low", tmp_path / "low.set", overwrite=there)
        assert (tmp_path / "low.set").read_text() == "mine"
    (tmp_path / "low.set").unlink()
    swquant.export_set(pool, "low", tmp_path / "low.set")
    swquant.export_set(pool, "low", tmp_path / "low.set", overwrite=True)
    with CompressedCheckpoint(base) as checkpoint:
        source = checkpoint.manifest["source"]["name"]
    assert source == "original"
    other = swquant.compress(base.parent / "original", tmp_path / "other", bits=3, block="32", prompt="t5 t9").path
    ran = cli("adapt", other, tmp_path / "out", "--import-set", tmp_path / "low.set")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "was trained over another base, its fingerprint says" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_set_is_found(pool: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pool, tmp_path / "p")
    path = tmp_path / "p" / pool_path("high")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert any("its sha256 is not the manifest's" in problem for problem in swquant.verify(tmp_path / "p"))
    with pytest.raises(swquant.SwquantError, match="is not what was written, its sha256 says"):
        swquant.load(tmp_path / "p", task="high")
    swquant.load(tmp_path / "p", task="low")  # the other one is not read
    path.unlink()
    with pytest.raises(swquant.SwquantError, match="is missing; fetch it again"):
        swquant.load(tmp_path / "p", task="high")


def test_a_file_says_what_it_is(pool: Path) -> None:
    with PoolFile(pool / pool_path("low")) as file:
        assert (file.name, list(file.record["tasks"])) == ("low", ["low"])
        whole = file.whole()
    assert set(whole.blocks) == set(whole.seen) == set(whole.own)
    for name, blocks in whole.blocks.items():
        assert whole.seen[name].shape[:2] == (len(torch.unique(blocks.cols)), QUICK["block"])
    assert sorted(path.stem for path in (pool / POOL).iterdir()) == ["base", "high", "low"]


# --- what a person sees


def test_the_pool_is_shown(cli: Cli, pool: Path, tmp_path: Path) -> None:
    shown = " ".join(cli("inspect", pool).out.split())
    assert "Pool" in shown
    task = file_of(tmp_path, "middle")
    ran = cli("adapt", pool, tmp_path / "out", "--task", f"middle={task}", "--dry-run", *words())
    assert ran.code == 0, ran.err
    said = " ".join(ran.out.split())
    assert "middle: how much of its gradient each set would take" in said
    assert "the threshold is" in said
    assert "random spaces of the same ranks say" in said
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle-0.txt"]


def test_what_cannot_be_is_one_line_before_any_work(cli: Cli, base: Path, pool: Path, tmp_path: Path) -> None:
    text, out = file_of(tmp_path, "low"), tmp_path / "out"
    (tmp_path / "short").write_text("t2 t3")
    task = ("--task", f"new={text}")
    for typed, problem in {
        (base.parent / "original", out, *task): "not a compressed checkpoint",
        (base, out): "there is nothing to learn; name a task",
        (base, out, "--task", "law"): "--task law: not NAME=FILE",
        (base, out, "--task", f"auto={text}"): "says who answers",
        (base, out, "--task", f"L W={text}"): "is not made of a to z",
        (base, out, *task, *task): "two tasks alike",
        (pool, out, "--task", f"low={text}"): "--task low is there already",
        (base, out, "--task", f"new={tmp_path / 'none'}"): "cannot be read",
        (base, out, "--task", f"new={tmp_path / 'short'}"): "less than two windows",
        (base, out, *task, "--budget", "10"): "--budget 10 holds no block",
        (base, out, *task, "--energy", "2"): "--energy 2.0 is outside 0 to 1",
        (base, out, *task, "--threshold", "much"): "--threshold 'much' is no share",
        (base, out, *task, "--soft", "-1"): "--soft -1.0 is outside",
        (base, out, "--drop-set", "law"): "has no set 'law'; it has none",
        (pool, out, "--drop-set", "law"): "has no set 'law'; it has low, high",
        (pool, out, "--export-set", "law"): "has no set 'law'",
        (pool, out, "--export-set", "low", *task): "--export-set does nothing else",
        (base, out, "--import-set", tmp_path / "none"): "no such file",
        (base, out, "--import-set", tmp_path / "short"): "short",
        (pool, pool, *task): "holds the source",
    }.items():
        ran = cli(
            "adapt", *typed, *(() if "--budget" in typed else ("--budget", "1bits")), "--block", "16", "--window", "32"
        )
        assert (ran.code, ran.out) == (1, ""), typed
        assert len(ran.err.strip().splitlines()) == 1, ran.err
        assert problem in ran.err, typed
        assert not out.exists()
    assert not (tmp_path / "out.adapting").exists()


def test_a_pool_is_not_tuned_over(cli: Cli, pool: Path, tmp_path: Path) -> None:
    ran = cli("tune", pool, tmp_path / "out", "--text", file_of(tmp_path, "low"))
    assert "the sets of its pool fit it as it is" in ran.err
