"""Error feedback against a plain loop in float64, and what it is for."""

from __future__ import annotations

import pytest
import torch

from calibrationless import (
    Channel,
    Group,
    Points,
    Tile,
    damping_for,
    dequantize,
    expand,
    feed_back,
    inverse_factor,
    quantize,
    restore,
)


def inputs(channels: int, tokens: int = 400) -> torch.Tensor:
    torch.manual_seed(channels)
    mixed = torch.randn(tokens, channels // 2) @ torch.randn(channels // 2, channels)
    return mixed * torch.logspace(-1, 1, channels)


def loop(weight, quantized, factor, kept):
    """One weight after the other: the definition."""
    order, upper = factor[0].tolist(), factor[1].double()
    scale = expand(quantized.scale, quantized.block, quantized.shape).double()
    zero = torch.full_like(scale, 2 ** (quantized.bits - 1))
    if quantized.zero_point is not None:
        zero = expand(quantized.zero_point, quantized.block, quantized.shape).double()
    exact = {(int(r), int(c)) for r, c in zip(kept.rows, kept.cols, strict=True)}
    values = torch.empty_like(scale)
    for row in range(weight.shape[0]):
        w = weight[row].double().clone()
        for position, col in enumerate(order):
            code = torch.clamp(torch.round(w[col] / scale[row, col]) + zero[row, col], 0, 2**quantized.bits - 1)
            value = (code - zero[row, col]) * scale[row, col]
            if (row, col) in exact:
                value = weight[row, col].double()
            error = (w[col] - value) / upper[position, position]
            values[row, col] = value
            for later in range(position + 1, len(order)):
                w[order[later]] -= error * upper[position, later]
    return values.float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [Group(16), Channel(), Tile(4, 16)], ids=str)
def test_feedback_is_that_of_a_plain_loop(block, symmetric):
    x = inputs(160)  # more columns than are collected at a time
    torch.manual_seed(1)
    weight = torch.randn(8, 160)
    factor = inverse_factor(x.T @ x)
    plain = quantize(weight, block, 3, symmetric=symmetric)
    kept = Points.at(weight, torch.tensor([0, 3, 7]), torch.tensor([5, 159, 0]))
    found = restore(dequantize(feed_back(weight, plain, factor, kept)), kept)
    expected = loop(weight, plain, factor, kept)
    assert float(((found - expected).abs() > 1e-4).float().mean()) < 0.01  # a tie may fall to the other side


@pytest.mark.parametrize("block", [Group(16), Channel()], ids=str)
def test_the_layer_s_output_is_closer(block):
    x = inputs(96)
    torch.manual_seed(2)
    weight = torch.randn(32, 96)
    searched = quantize(weight, block, 3, importance=x.square().mean(dim=0))
    fed = feed_back(weight, searched, inverse_factor(x.T @ x))
    errors = [float(((dequantize(q) - weight) @ x.T).square().sum()) for q in (searched, fed)]
    assert errors[1] < 0.7 * errors[0]
    assert torch.equal(fed.scale, searched.scale)


def test_more_tokens_need_less_damping():
    assert damping_for(4096) == 1
    assert damping_for(1024) > damping_for(4096) > damping_for(16384) > 0.1
    gram = inputs(32).T @ inputs(32)
    for damping in (1.0, 0.125):
        order, upper = inverse_factor(gram, damping)
        h = gram[order][:, order] + torch.diag(damping * gram.diagonal()[order] + 0.01 * gram.diagonal().mean())
        inverse = upper.T @ upper / gram.diagonal().mean()
        assert torch.allclose(inverse @ h, torch.eye(32), atol=1e-3)


def test_threads_change_nothing():
    x, threads = inputs(768, 900), torch.get_num_threads()
    torch.manual_seed(3)
    weight, factor = torch.randn(1500, 768), inverse_factor(x.T @ x)
    plain, codes = quantize(weight, Group(64), 4), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            codes.append(feed_back(weight, plain, factor).codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*codes)


def test_silent_inputs_leave_plain_rounding():
    weight = torch.randn(4, 32)
    plain = quantize(weight, Group(16), 4)
    assert torch.equal(feed_back(weight, plain, inverse_factor(torch.zeros(32, 32))).codes, plain.codes)


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan))
