"""The recipe is the order of its steps: held against the same steps written out, and what it promises of patches."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import random_weight

from calibrationless import (
    Channel,
    Clip,
    Evidence,
    Group,
    Points,
    Recipe,
    dequantize,
    feed_back,
    follow,
    inverse_factor,
    measure,
    quantize,
    restore,
    worst,
)


def evidence(inputs: int, seed: int = 0) -> Evidence:
    x = torch.randn(40, inputs, generator=torch.Generator().manual_seed(seed))
    x[:, seed % inputs] *= 30  # a massive channel
    gram = x.T @ x
    return Evidence(importance=gram.diagonal().clone(), energy=gram.diagonal().clone(), factor=inverse_factor(gram))


@given(
    rows=st.integers(1, 24),
    groups=st.integers(1, 4),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    outliers=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=40)
def test_it_is_its_steps_in_order(rows, groups, bits, symmetric, outliers, data):
    weight = random_weight((rows, 16 * groups), seed=rows)
    known = evidence(weight.shape[1])
    point = (data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, weight.shape[1] - 1)))
    recipe = Recipe(Group(16), bits, symmetric, super_weights=(point,), outliers=outliers)
    made = follow(recipe, weight, known)

    keep = torch.zeros(rows, groups, dtype=torch.bool)
    keep[point[0], point[1] // 16] = True
    expected = quantize(
        weight, Group(16), bits, symmetric=symmetric, importance=known.importance, keep_extreme=keep.flatten()
    )
    kept = worst(weight, expected, outliers, always=[point], importance=known.importance)
    held = kept if outliers else Points.at(weight, torch.tensor([point[0]]), torch.tensor([point[1]]))
    expected = feed_back(weight, expected, known.factor, held)
    assert torch.equal(made.quantized.codes, expected.codes)
    assert torch.equal(made.quantized.scale, expected.scale)
    assert list(made.patches) == (["outliers"] if outliers else [])
    for patch in made.patches.values():
        assert torch.equal(patch.values, kept.values)
    assert made.error == measure(weight, expected, *made.patches.values(), importance=known.energy)


def test_held_out_super_weights_do_not_stretch_their_block_and_come_back():
    weight = random_weight((4, 32), seed=1)
    weight[2, 7] = 50.0
    recipe = Recipe(Channel(), 4, super_weights=((2, 7),), outliers=1, hold_out=True)
    made = follow(recipe, weight)
    rest = weight.clone()
    rest[2, 7] = 0.0
    assert torch.equal(made.quantized.scale, quantize(rest, Channel(), 4).scale)
    assert float(restore(dequantize(made.quantized), *made.patches.values())[2, 7]) == 50.0
    stretched = follow(Recipe(Channel(), 4, clip=Clip("z", 3.0), super_weights=((2, 7),), outliers=1), weight)
    assert float(dequantize(stretched.quantized)[2, 7]) == pytest.approx(50.0)  # its block still represents it


def test_recipe_evidence_and_result_can_be_sent_to_another_process():
    weight, known = random_weight((6, 48), seed=3), evidence(48)
    recipe = Recipe(Group(16), 4, clip=None, super_weights=((1, 2),), outliers=5)
    sent_recipe, sent_weight, sent_known = pickle.loads(pickle.dumps((recipe, weight, known)))
    here, there = (
        follow(recipe, weight, known),
        pickle.loads(pickle.dumps(follow(sent_recipe, sent_weight, sent_known))),
    )
    assert torch.equal(here.quantized.codes, there.quantized.codes)
    assert here.error == there.error
    assert list(here.patches) == list(there.patches)
