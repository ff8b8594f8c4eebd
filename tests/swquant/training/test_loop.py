"""The loop: it learns, it goes on to the same bytes after an interruption at any step, and it stops at NaN."""

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporters.errors import SwquantError
from swquant.training.loop import DivergedError, Schedule, State, fingerprint_of, train

GOAL = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
SCHEDULE = Schedule(12, 0.1, parts=2)


class Problem:
    """A least-squares problem whose batches depend on the step alone."""

    def __init__(self) -> None:
        self.w = nn.Parameter(torch.zeros(3, 4))
        self.end_at: tuple[int, int] | None = None
        self.seen: list[tuple[int, int]] = []

    def loss(self, step: int, part: int) -> Tensor:
        self.seen.append((step, part))
        if (step, part) == self.end_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + part))
        return ((x @ (self.w - GOAL).T) ** 2).mean()


def run(problem: Problem, state: State | None = None) -> list[float]:
    return train({"w": problem.w}, problem.loss, SCHEDULE, state=state).losses


def test_the_loss_falls_and_every_part_is_used() -> None:
    problem = Problem()
    losses = run(problem)
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    assert problem.seen == [(step, part) for step in range(12) for part in range(2)]


def test_a_look_ahead_inside_a_step_leaves_no_gradient_to_it() -> None:
    plain, looking = Problem(), Problem()

    def look(step: int, part: int) -> Tensor:
        before = looking.w.detach().clone()
        train({"w": looking.w}, lambda *_: 3 * looking.loss(7, 0), Schedule(2, 0.1))
        with torch.no_grad():
            looking.w.copy_(before)
        return looking.loss(step, part)

    train({"w": plain.w}, plain.loss, Schedule(3, 0.1))
    train({"w": looking.w}, look, Schedule(3, 0.1))
    assert torch.equal(plain.w, looking.w)


def test_parts_of_a_step_are_one_batch() -> None:
    """Two micro-batches give the step of both at once."""
    one, two = Problem(), Problem()
    train({"w": one.w}, lambda step, _: (one.loss(step, 0) + one.loss(step, 1)) / 2, Schedule(3, 0.1))
    train({"w": two.w}, two.loss, Schedule(3, 0.1, parts=2))
    assert torch.allclose(one.w, two.w)


def test_it_is_adamw_with_a_rate_that_falls_to_zero() -> None:
    mine, theirs = Problem(), Problem()
    run(mine)
    optimizer = torch.optim.AdamW([theirs.w], lr=0.1, betas=(0.9, 0.95), weight_decay=0)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.1 * (12 - step) / 12
        optimizer.zero_grad()
        ((theirs.loss(step, 0) + theirs.loss(step, 1)) / 2).backward()
        nn.utils.clip_grad_norm_([theirs.w], 1.0)
        optimizer.step()
    assert torch.allclose(mine.w, theirs.w, atol=1e-6)


@pytest.mark.parametrize("end_at", [(0, 0), (0, 1), (5, 0), (5, 1), (11, 1)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, end_at: tuple[int, int]) -> None:
    whole = Problem()
    losses = run(whole)
    path, key = tmp_path / "out.state", fingerprint_of("this")
    stopped = Problem()
    stopped.end_at = end_at
    state = State.at(path, key)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(stopped, state)
    assert any(str(path) in note for note in caught.value.__notes__)
    again = Problem()
    state = State.at(path, key)
    assert run(again, state) == losses
    assert torch.equal(again.w, whole.w)
    assert again.seen[0] == (end_at[0], 0)
    state.remove()
    assert [*tmp_path.iterdir()] == []


def test_a_state_of_another_result_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "out.state"
    state = State.at(path, fingerprint_of("this"))
    state.saved.tensors["text"], state.saved.facts["rate"] = torch.arange(3), 0.5
    state.write()
    same = State.at(path, fingerprint_of("this"))
    assert torch.equal(same.saved.tensors["text"], torch.arange(3))
    assert same.saved.facts == {"rate": 0.5}
    assert State.at(path, fingerprint_of("that")).saved.tensors == {}


@pytest.mark.parametrize("content", [b"", b"text of mine", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_in_the_way_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.state"
    path.write_bytes(content)
    with pytest.raises(SwquantError, match="out.state"):
        State.at(path, "key")
    assert path.read_bytes() == content


def test_a_loss_that_is_no_number_stops_it_with_the_last_good_state(tmp_path: Path) -> None:
    problem, good = Problem(), Problem()
    path = tmp_path / "out.state"

    def loss(step: int, part: int) -> Tensor:
        return problem.loss(step, part) * (float("nan") if step == 4 else 1)

    state = State.at(path, "key")
    with pytest.raises(DivergedError, match="loss of step 5 is NaN or infinite at a learning rate of 0.1; lower it"):
        train({"w": problem.w}, loss, SCHEDULE, state=state)
    good.end_at = (4, 0)
    with pytest.raises(KeyboardInterrupt):
        train({"w": good.w}, good.loss, SCHEDULE)
    assert torch.equal(problem.w, good.w)
    assert torch.equal(State.at(path, "key").saved.moments["values/w"], good.w)
