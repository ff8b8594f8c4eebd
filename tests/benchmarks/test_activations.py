"""The baselines of benchmarks/activations.py do what their papers say."""

from __future__ import annotations

import sys

import pytest
import torch
from support.paths import PROJECT
from torch import nn

from calibrationless import massive_channels, round_activations

sys.path.insert(0, str(PROJECT / "benchmarks"))

from activation_methods import METHODS, Rounder, round_weights, smoothing

BY_NAME = {method.name.partition(" (")[0]: method for method in METHODS}


class Block(nn.Module):
    """Two linears that read one norm, and one that reads none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.out = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(16, 32)
        with torch.no_grad():
            self.norm.weight[5] = 200.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return self.out(self.q(normed) * self.k(normed))


NORMS = {"q": "norm", "k": "norm", "out": ""}


@pytest.fixture
def block() -> Block:
    return Block().eval().requires_grad_(False)


def peaks_of(block: Block, x: torch.Tensor) -> dict[str, torch.Tensor]:
    normed = block.norm(x)
    inside = block.q(normed) * block.k(normed)
    peaks = {"q": normed, "k": normed, "out": inside}
    return {name: value.abs().flatten(0, -2).amax(0) for name, value in peaks.items()}


def test_smoothing_alone_changes_nothing_and_levels_the_inputs(block: Block) -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    expected, peaks = block(x), peaks_of(block, x)
    weights = {name: block.get_submodule(name).weight.clone() for name in NORMS}
    scales = smoothing(weights, peaks, NORMS)
    assert set(scales) == {"q", "k"}  # what reads no norm is left alone, as in the original
    assert torch.equal(scales["q"], scales["k"])
    columns = torch.maximum(weights["q"].abs().amax(0), weights["k"].abs().amax(0))
    torch.testing.assert_close(scales["q"], (peaks["q"] / columns).sqrt())
    for name, scale in scales.items():
        block.get_submodule(name).weight.copy_(weights[name] * scale)
    with Rounder(block, NORMS).active(None, per_token=True, scales=scales):
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-3)
    smoothed = peaks["q"] / scales["q"]
    assert smoothed.max() / smoothed.median() < 0.2 * peaks["q"].max() / peaks["q"].median()


@pytest.mark.parametrize("per_token", [True, False])
def test_masks_keep_what_their_names_say(per_token: bool) -> None:
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    x[0, 1, 7], x[..., 9] = 900.0, 300.0
    peaks = {"q": x.abs().flatten(0, -2).amax(0)}
    kept = {}
    for name in ("naive", "one scalar per tensor", "4 largest per token", "4 channels"):
        mask = BY_NAME[name].keep(peaks)("q", x)
        kept[name] = None if mask is None else mask.expand_as(x)
    assert kept["naive"] is None
    assert kept["one scalar per tensor"].nonzero().tolist() == [[0, 1, 7]]
    assert kept["4 largest per token"].sum(-1).eq(4).all()
    assert kept["4 largest per token"][..., 9].all()
    assert (
        kept["4 channels"].flatten(0, -2).all(0).nonzero().flatten().tolist() == massive_channels(peaks["q"]).tolist()
    )
    assert kept["4 channels"][..., 9].all()
    naive = (round_activations(x, per_token=per_token) - x).abs().mean()
    for name in ("4 largest per token", "4 channels"):
        assert (round_activations(x, kept[name], per_token=per_token) - x).abs().mean() < naive / 10


def test_the_rounder_rounds_only_while_it_is_active(block: Block) -> None:
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    before = block(x)
    with Rounder(block, NORMS).active(BY_NAME["naive"].keep({}), per_token=False):
        assert not torch.equal(block(x), before)
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_after_scaling(bits: int, block: Block) -> None:
    weights = {"q": block.q.weight.clone()}
    energies, scales = {"q": torch.ones(32)}, {"q": torch.full((32,), 4.0)}
    rounded = round_weights(weights, bits, energies, scales)["q"]
    error = (rounded / 4 - weights["q"]).norm() / weights["q"].norm()
    assert error < (0.01 if bits == 8 else 0.1)
    assert not torch.equal(rounded / 4, weights["q"])
    torch.testing.assert_close(rounded, round_weights(weights, bits, energies, {})["q"] * 4)  # a power of two
