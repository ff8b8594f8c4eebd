"""The compiled loops of rounding and measuring: what torch gives step by step, to the bit where nothing is added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrationless import batched, for_pieces
from calibrationless.loops import run_loop

SHAPES = [(64, 128), (7, 5), (300, 33), (2, 1), (1, 4096)]


def odd_weights(shape: tuple[int, int]) -> Tensor:
    """Blocks of all magnitudes, of zeros, of one sign."""
    generator = torch.Generator().manual_seed(shape[0])
    weights = torch.randn(shape, generator=generator)
    weights *= 10.0 ** torch.randint(-30, 30, (shape[0], 1), generator=generator)
    weights[0, 0] = -0.0
    for row, change in enumerate((torch.zeros_like, torch.abs, lambda values: -values.abs())):
        if row < len(weights) - 1:
            weights[row] = change(weights[row])
    return weights


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("odd", [None, torch.inf, -torch.inf, torch.nan], ids=str)
def test_the_extremes_of_blocks(shape: tuple[int, int], odd: float | None) -> None:
    weights = odd_weights(shape)
    if odd is not None:
        weights[-1, shape[1] // 2] = odd
    found, expected = torch.empty(2, shape[0]), torch.empty(2, shape[0])
    run_loop("block_extremes", weights.device, weights, *found)
    batched.block_extremes(weights, *expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    negative_nan = (-torch.tensor(torch.nan)).copysign(torch.tensor(-1.0))
    weights[-1, 0] = negative_nan
    run_loop("block_extremes", weights.device, weights, *found)
    assert bool(torch.isnan(found[:, -1]).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offsets", [False, True])
def test_codes_are_those_of_torch(shape: tuple[int, int], bits: int, offsets: bool) -> None:
    weights = odd_weights(shape)
    scale = weights.abs().amax(dim=1) / -(1 << (bits - 1))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale[-1] = 1e-40  # the quotient is infinite
    offset = weights[:, -1].clone() if offsets else torch.zeros_like(scale)
    zero = (torch.arange(shape[0]) % (1 << bits)).to(torch.float32)
    weights[0] = torch.arange(shape[1]) * 0.5 * scale[0] + offset[0]  # ties
    found, expected = (torch.empty(shape, dtype=torch.uint8) for _ in range(2))
    run_loop("cut_blocks", weights.device, weights, scale, offset, zero, 1 << bits, found)
    batched.cut_blocks(weights, scale, offset, zero, 1 << bits, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_add_up_to_what_float64_says(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    weights, noise = torch.randn(2, *shape, generator=generator)
    importance, decoded = torch.rand(3, shape[1], generator=generator), weights + 0.1 * noise
    found, expected = (torch.empty(5, dtype=torch.float64) for _ in range(2))
    run_loop("error_sums", weights.device, decoded, weights, importance, 2, found)
    batched.error_sums(decoded, weights, importance, 2, expected)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    heavy = importance[torch.arange(2, shape[0] + 2) % 3].double()
    error, own = (decoded.double() - weights.double()).square(), weights.double().square()
    plain = [error.sum(), own.sum(), error.max().sqrt(), (error * heavy).sum(), (own * heavy).sum()]
    assert found.tolist() == pytest.approx([float(value) for value in plain], rel=1e-5)


def test_pieces_cover_all_rows_whatever_their_size() -> None:
    for piece in (1, 40, 1000, 1 << 20):
        slices = for_pieces(lambda part: part, 77, 10, piece=piece)
        assert [row for part in slices for row in range(part.start, part.stop)] == list(range(77))
        assert len(slices) == -(-77 // max(1, piece // 10))
