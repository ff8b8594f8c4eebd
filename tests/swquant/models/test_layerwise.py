"""Passes side by side: in which order they run, that each gives what it gives alone, and how they end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

from swquant.models.layerwise import side_by_side


class Chain(nn.Module):
    """Layers in a list, run in any order; what they do is written down."""

    def __init__(self, layers: int = 3, order: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers))
        self.order = order or tuple(range(layers))
        self.log: list[tuple[int, int]] = []  # (pass, layer)

    def forward(self, number: int, x: torch.Tensor) -> torch.Tensor:
        for layer in self.order:
            x = x + self.layers[layer](x)
            self.log.append((number, layer))
        return x


PARTS = (("layers.0",), ("layers.1",), ("layers.2",))


def started(model: Chain, count: int = 3) -> tuple[list, dict[int, torch.Tensor]]:
    results: dict[int, torch.Tensor] = {}
    inputs = torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(0))

    def run(number: int) -> None:
        results[number] = model(number, inputs[number])

    return [lambda number=number: run(number) for number in range(count)], results


def test_all_passes_are_through_a_layer_before_one_enters_the_next() -> None:
    model = Chain()
    runs, results = started(model)
    before = threading.active_count()
    with side_by_side(model, PARTS, runs) as passes:
        assert not passes.has_run(0)
        while passes.step():
            pass
        assert all(map(passes.has_run, range(3)))
    assert model.log == [(number, layer) for layer in range(3) for number in range(3)]
    assert threading.active_count() == before
    again, alone = started(model)
    for run in again:
        run()
    for number, result in results.items():
        assert not result.requires_grad
        assert torch.equal(result, alone[number])


def test_layers_may_come_in_any_order_and_again() -> None:
    model = Chain(order=(0, 1, 0, 2))
    runs, _ = started(model, 2)
    with side_by_side(model, PARTS, runs) as passes:
        while passes.step():
            pass
    assert model.log == [(number, layer) for layer in (0, 1, 0, 2) for number in range(2)]


def test_the_parts_of_a_layer_are_one_station() -> None:
    """XLM keeps attentions and MLPs in lists of their own."""
    model = Chain(4, order=(0, 2, 1, 3))
    runs, _ = started(model, 2)
    with side_by_side(model, (("layers.0", "layers.2"), ("layers.1", "layers.3")), runs) as passes:
        while passes.step():
            pass
    assert model.log == [(0, 0), (0, 2), (1, 0), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]


def test_another_pass_meanwhile_meets_no_gate() -> None:
    model = Chain()
    runs, _ = started(model)
    with side_by_side(model, PARTS, runs) as passes:
        passes.step()
        model(9, torch.zeros(2, 4))
    assert model.log == [(9, layer) for layer in range(3)]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("steps", range(5))
def test_passes_can_be_left_anywhere(steps: int) -> None:
    model, before = Chain(), threading.active_count()
    runs, _ = started(model)
    with side_by_side(model, PARTS, runs) as passes:
        for _ in range(steps):
            passes.step()
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [ValueError("no such weight"), KeyboardInterrupt()])
def test_what_a_pass_raises_arrives_where_it_was_let_go_on(error: BaseException) -> None:
    model, before = Chain(), threading.active_count()

    def fail(module: nn.Module, args: object) -> None:
        raise error

    runs, _ = started(model)
    with pytest.raises(type(error)), side_by_side(model, PARTS, runs) as passes:  # noqa: PT012
        model.layers[1].register_forward_pre_hook(fail)
        while passes.step():
            pass
    assert threading.active_count() == before
    assert {layer for _, layer in model.log} == {0}


def test_ctrl_c_while_a_pass_runs_ends_them_all() -> None:
    """The signal reaches the main thread, which waits; the pass that runs is stopped at its next module."""
    model, before = Chain(), threading.active_count()
    running = threading.Event()

    def slow(module: nn.Module, args: object) -> None:
        running.set()
        time.sleep(0.2)

    model.layers[1][0].register_forward_pre_hook(slow)
    runs, _ = started(model)
    threading.Thread(target=lambda: (running.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    with pytest.raises(KeyboardInterrupt), side_by_side(model, PARTS, runs) as passes:  # noqa: PT012
        while passes.step():
            pass
    assert {layer for _, layer in model.log} == {0}
    assert threading.active_count() == before
