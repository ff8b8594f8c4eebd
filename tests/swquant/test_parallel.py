"""Several processes train together: they give what one gives, one of them is heard, and none waits for the dead."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny_models import PROMPT, save_model, tiny_model
from support.together import Ended, Run, accelerate, ended, environment, forked, torchrun

import swquant
from swquant.parallel import World, join, launched, world

STEPS = ["--steps", 6, "--window", 64, "--batch", 3]
ADAPTED = ["adapt", "small", "--block", 16, "--budget", "1bits", "--texts", 6, "--warmup", 3, "--lr", "3e-3"]
TUNED = ["--block", 16, "--warmup", 3, *STEPS, "--lr", "3e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, itself at 2 bits, a text, and conversations whose responses have 1 to 40 words."""
    folder = tmp_path_factory.mktemp("together")
    save_model(tiny_model("llama", num_hidden_layers=3), folder / "original", torch.bfloat16)
    swquant.compress(folder / "original", folder / "small", prompt=PROMPT, bits=2, block="32", outliers=0.002)
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{draw.randrange(2, 128)}" for _ in range(count))

    said = [{"prompt": words(draw.randrange(2, 10)), "response": words(draw.randrange(1, 41))} for _ in range(13)]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, said)))
    (folder / "text.txt").write_text(words(3000))
    return folder


def errors(run: Ended) -> list[str]:
    """What the processes say of the end, without progress and torchrun's own report."""
    return [line for line in run.err.splitlines() if line.startswith(("error:", "interrupted", "Usage", "│ "))]


def close(one: Path, other: Path, *, of: float) -> None:
    """Two folders with the same files, whose tensors differ by that share of their largest number at most: sums in
    another order may be rounded to the next number of bfloat16."""
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
    for name in names:
        if name.suffix != ".safetensors" or (one / name).read_bytes() == (other / name).read_bytes():
            continue
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, theirs[key]), key
                continue
            one_is, other_is = tensor.float(), theirs[key].float()
            if key.startswith(
                ("seen/", "own/")
            ):  # bases of spaces, which are the same whatever way their columns point
                one_is, other_is = one_is @ one_is.mT, other_is @ other_is.mT
            apart = (one_is - other_is).abs() / one_is.abs().max()
            assert float(apart.max()) <= of, key


def record_of(out: Path) -> dict[str, Any]:
    found = [out / name for name in ("swquant/manifest.json", "patches.json") if (out / name).exists()]
    return json.loads((found or list(out.rglob("patches.json")))[0].read_text())["tuned"]["tuned"]  # type: ignore[no-any-return]


def same_training(one: Path, other: Path) -> None:
    mine, theirs = record_of(one), record_of(other)
    assert theirs["losses"] == pytest.approx(mine["losses"], rel=1e-6)
    for key in ("tokens", "blocks", "bytes", "rate"):
        assert theirs[key] == mine[key]
    for key in ("held_out_before", "held_out_after"):
        assert theirs[key] == pytest.approx(mine[key], rel=1e-6)
    close(one, other, of=2**-7)  # one unit of bfloat16


def test_a_process_that_was_started_alone_is_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world() == World(0, 1)
    assert not launched()
    assert join(1) == World(0, 1)
    tensor = torch.ones(3)
    World().sum_([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert World().totals(2, 0.5) == [2.0, 0.5]
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters say this to everybody
    assert not launched()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_there_is(count: int, size: int) -> None:
    shares = [range(count)[World(rank, size).share(count)] for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_do_what_one_does_and_one_of_them_is_heard(folder: Path, tmp_path: Path) -> None:
    """Batches of 3 conversations of unequal lengths: one process has one of them, the other two."""
    how = [folder / "original", tmp_path / "out", "--budget", "10%", *TUNED]
    data, missing = ["--data", folder / "said.jsonl"], ["--data", folder / "missing.jsonl"]
    one, two, bad, wrong = forked(
        Run(1, ["tune", folder / "original", tmp_path / "one", *how[2:], *data]),
        Run(2, ["tune", folder / "original", tmp_path / "two", *how[2:], *data]),
        Run(2, ["tune", *how, *data], ["tune", *how, *missing]),
        Run(2, ["tune", *how, "--no-such-option"]),
    )
    assert (one.codes, two.codes) == ([0], [0, 0]), one.err + two.err
    same_training(tmp_path / "one", tmp_path / "two")
    assert two.out.replace(str(tmp_path / "two"), str(tmp_path / "one")) == one.out
    assert two.err.count("Loading") == one.err.count("Loading") == 1
    assert bad.codes == [1, 1]
    assert errors(bad) == [
        f"error: {folder / 'missing.jsonl'}: cannot be read (No such file or directory); give a jsonl file"
    ]
    assert wrong.codes == [2, 2]
    assert wrong.err.count("--no-such-option") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, accelerate])
def test_recovery_by_what_a_user_types(folder: Path, tmp_path: Path, launch: Any) -> None:
    how = ["--against", folder / "original", "--budget", "1bits", *TUNED, "--texts", 12, "--lr", "auto"]
    how += ["--eval-text", folder / "text.txt"]
    (one,) = forked(Run(1, ["tune", folder / "small", tmp_path / "one", *how, "--json"]))
    two = ended(launch(2, "tune", folder / "small", tmp_path / "two", *how, "--json"))
    assert (one.codes, two.codes) == ([0], [0]), one.err + two.err
    same_training(tmp_path / "one", tmp_path / "two")
    mine, theirs = json.loads(one.out), json.loads(two.out)
    assert theirs["path"] == str(tmp_path / "two")
    for name, values in mine["evaluation"].items():
        assert theirs["evaluation"][name] == pytest.approx(values, rel=1e-3)
    assert swquant.verify(tmp_path / "two") == []
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["tune", "small", "--against", "original", "--train", "both", "--budget", "1bits", "--texts", 9, *TUNED],
        ["tune", "small", "--text", "text.txt", "--select", "gradient", "--budget", "1bits", *TUNED],
        ["tune", "original", "--text", "text.txt", "--merge", "--budget", "10%", *TUNED],
    ],
    ids=["scales", "gradient", "merged"],
)
def test_other_ways_to_tune(folder: Path, tmp_path: Path, words: Sequence[object], monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    runs = [Run(count, [*words[:2], tmp_path / str(count), *words[2:]]) for count in (1, 3)]
    for run in forked(*runs):
        assert set(run.codes) == {0}, run.err
    close(tmp_path / "1", tmp_path / "3", of=2**-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "of"),
    [
        (["distill", "original", "--layers", "0,2", "--texts", 9, "--kd-until", "auto", "--lr", "auto"], 2**-7),
        (["moe", "original", "--experts", "3x4", "--every", 1, "--text", "text.txt", "--capacity", 0], 2**-7),
        ([*ADAPTED, "--task", "a=said.jsonl", "--task", "b=text.txt", "--soft", 0.5], 1e-2),
    ],
    ids=["distill", "moe", "adapt"],
)
def test_the_other_verbs_that_train(
    folder: Path, tmp_path: Path, words: Sequence[object], of: float, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder)
    runs = [Run(count, [*words[:2], tmp_path / str(count), *words[2:], *STEPS]) for count in (1, 2)]
    one, two = forked(*runs)
    assert (one.codes, two.codes) == ([0], [0, 0]), one.err + two.err
    assert two.err.count("Loading") == one.err.count("Loading")
    close(tmp_path / "1", tmp_path / "2", of=of)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_said_once(folder: Path, tmp_path: Path) -> None:
    how = ["tune", folder / "original", tmp_path / "out", "--budget", "10%", *TUNED]
    text, said = ["--text", folder / "text.txt"], ["--data", folder / "said.jsonl"]
    runs = {
        "is done by one process": Run(2, ["compress", folder / "original", tmp_path / "out"]),
        "--batch 3 gives 4 processes less than one": Run(4, [*how, *text]),
        "has other inputs than the first": Run(2, [*how, *text], [*how, *said]),
        "exists already": Run(2, ["tune", folder / "original", folder / "small", *TUNED, *text]),
    }
    for words, run in zip(runs, forked(*runs.values()), strict=True):
        assert set(run.codes) == {1}
        (line,) = errors(run)
        assert words in " ".join(line.split()), line
    assert list(tmp_path.iterdir()) == []


TRAINING = """
import math, torch
from swquant.parallel import join
from swquant.training.loop import DivergedError, Schedule, train
ours, w = join(2), torch.nn.Parameter(torch.zeros(3))
def loss(step, part):
    if step == 2 and ours.rank == {rank}:
        {act}
    return ((w - 1) ** 2).sum() * (ours.rank + 1) / 3
try:
    train({{"w": w}}, loss, Schedule(4, 0.1))
except DivergedError as error:
    print("stopped", len(str(error)), flush=True)
"""


@pytest.mark.slow
def test_what_is_no_number_in_one_process_stops_all() -> None:
    nan = "return w.sum() * math.nan"
    inf = "return (w * 0 + 1e-45).sqrt().sum() * 1e38 * 0 + (w * 1e38).pow(2).sum()"
    for run in forked(*(Run(2, ["-c", TRAINING.format(rank=rank, act=act)]) for rank in (0, 1) for act in (nan, inf))):
        assert run.codes == [0, 0], run.err
        assert run.out.count("stopped") == 2


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_has_ended() -> None:
    begun = time.monotonic()
    for run in forked(*(Run(3, ["-c", TRAINING.format(rank=rank, act="raise SystemExit(7)")]) for rank in (0, 2))):
        assert sorted(run.codes) == [1, 1, 7]
        assert run.err.count("ProcessGoneError: another process of this run has ended") == 2
    assert time.monotonic() - begun < 60


TOLD = """
import torch
from swquant.parallel import ProcessGoneError, join
ours = join(4)
def make():
    assert ours.first
    return {"a": [1, 2.5, None], "b": "é"}
assert ours.same(make) == {"a": [1, 2.5, None], "b": "é"}
tensors = {"x": torch.arange(6).view(2, 3), "y": torch.tensor([True]), "z": torch.zeros(0, 4), "h": torch.ones(2).bfloat16()}
told = ours.same_tensors(lambda: tensors if ours.first else 1 / 0)
assert all(told[name].dtype == item.dtype and torch.equal(told[name], item) for name, item in tensors.items())
summed = [torch.full((2, 3), float(ours.rank)).T, torch.tensor([1, 2])]
ours.sum_(summed)
assert summed[0].tolist() == [[6.0, 6.0]] * 3 and summed[1].tolist() == [4, 8], summed
assert ours.totals(0.1, ours.rank) == [0.1 + 0.1 + 0.1 + 0.1, 6.0]
try:
    ours.same(lambda: 1 / 0)
except (ZeroDivisionError, ProcessGoneError) as error:
    assert isinstance(error, ZeroDivisionError) == ours.first
    print("failed", flush=True)
"""


@pytest.mark.slow
def test_what_one_process_makes_all_are_told() -> None:
    (run,) = forked(Run(4, ["-c", TOLD]))
    assert run.codes == [0] * 4, run.err
    assert run.out.count("failed") == 4


@contextmanager
def started(command: Sequence[str], until: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has come to write a line."""
    run = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stderr is not None
    try:
        for line in run.stderr:
            if line.startswith(until):
                yield run
                return
        raise AssertionError(f"it ended before it said {until!r}")
    finally:
        for child in psutil.Process(run.pid).children(recursive=True) if run.poll() is None else ():
            child.kill()
        run.kill()
        run.wait()


def of_rank(run: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(run.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


ENDING = """
import os, signal
from swquant.cli import main
from swquant.tune.session import Session
loss_of = Session.loss_of
def ending(self, step, part):
    if step == 3:
        os.kill(os.getpid(), signal.{signal})
    return loss_of(self, step, part)
Session.loss_of = ending
main({words})
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "the last is killed", "the first is killed"])
def test_it_goes_on_with_as_many_processes_or_others(folder: Path, tmp_path: Path, how: str) -> None:
    def words(out: str) -> list[str]:
        where = ["--data", folder / "said.jsonl", "--budget", "10%", *TUNED]
        return [*map(str, ["tune", folder / "original", tmp_path / out, *where])]

    ending = ["-c", ENDING.format(signal="SIGINT" if how == "Ctrl-C" else "SIGKILL", words=words("out"))]
    first, last = {
        "Ctrl-C": (ending, ending),
        "the last is killed": (words("out"), ending),
        "the first is killed": (ending, words("out")),
    }[how]
    whole, ended = forked(Run(2, words("whole")), Run(2, first, last))
    assert whole.codes == [0, 0], whole.err
    assert ended.codes == {"Ctrl-C": [130, 130], "the last is killed": [1, -9], "the first is killed": [-9, 1]}[how]
    assert not (tmp_path / "out").exists()
    said = errors(ended)
    if how == "the first is killed":
        assert said == []  # without torchrun it keeps the place where they agree on who speaks
    else:
        assert [line.partition(" (")[0].partition(";")[0] for line in said] == [
            "interrupted" if how == "Ctrl-C" else "error: another process of this run has ended"
        ]
        assert f"{tmp_path / 'out.tuning'}" in said[0]
    with safe_open(tmp_path / "out.tuning", "pt") as state:  # it writes one before the first step, and when it ends
        assert json.loads(state.metadata()["facts"])["step"] == (0 if how == "the first is killed" else 3)
    for name in ("two", "three"):
        (tmp_path / f"{name}.tuning").write_bytes((tmp_path / "out.tuning").read_bytes())
    two, three = forked(Run(2, words("two")), Run(3, words("three")))
    assert (two.codes, three.codes) == ([0, 0], [0, 0, 0]), two.err + three.err
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "two", "three", "out.tuning"}
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "whole")).read_bytes()
    same_training(tmp_path / "whole", tmp_path / "three")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_that_kills_the_rest_lets_the_first_write_its_state(folder: Path, tmp_path: Path, rank: int) -> None:
    words = ["--data", folder / "said.jsonl", "--budget", "10%", *TUNED, "--steps", 500]
    with started(torchrun(2, "tune", folder / "original", tmp_path / "out", *words), "Training 10 %") as run:
        of_rank(run, rank).kill()
        _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    (line,) = errors(Ended([], "", err))
    assert line.startswith("error: another process of this run has ended")
    with safe_open(tmp_path / "out.tuning", "pt") as state:
        assert (json.loads(state.metadata()["facts"])["step"] >= 50) == (rank == 1)
    assert (f"{tmp_path / 'out.tuning'}" in line) == (rank == 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.tuning"]
