"""Codes with a real offset: as good as trying one line after the other, stored as announced, and what they are for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrationless import (
    Block,
    Channel,
    Flat,
    Group,
    QuantizedTensor,
    Tile,
    compact_steps,
    dequantize,
    expand,
    feed_back,
    inverse_factor,
    measure,
    quantize,
    quantize_affine,
    to_blocks,
)
from calibrationless.affine import SHIFTS, STRETCHES

BLOCKS: list[Block] = [Group(16), Group(32), Channel(), Tile(2, 16), Flat(32)]


def line(w: Tensor, h: Tensor, codes: Tensor) -> tuple[float, float, float]:
    """(error, scale, offset) of the weighted least-squares line through codes, float64."""
    mass = h.sum()
    q, v = (h * codes).sum() / mass, (h * w).sum() / mass
    spread = float((h * (codes - q) ** 2).sum())
    scale = float((h * (codes - q) * (w - v)).sum()) / spread if spread > 0 else 0.0
    offset = float(v - scale * q)
    return float((h * (w - scale * codes - offset) ** 2).sum()), scale, offset


def reference(w: Tensor, h: Tensor, bits: int) -> float:
    """The least weighted error of one block, one trial after the other."""
    w, h = w.double(), h.double()
    top, low, high = 2**bits - 1, float(w.min()), float(w.max())
    if low == high:
        return 0.0
    best = (float("inf"), 0.0, 0.0)
    for stretch in STRETCHES:
        for shift in SHIFTS:
            inverse = top * stretch / (high - low)
            codes = ((w - (low + high) / 2) * inverse + top / 2 + shift).round().clamp(0, top)
            best = min(best, line(w, h, codes))
    for _ in range(4):
        if best[1] <= 0:
            break
        best = min(best, line(w, h, ((w - best[2]) / best[1]).round().clamp(0, top)))
    return best[0]


def errors(weight: Tensor, h: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Weighted squared error of each block, float64."""
    blocks = to_blocks(weight - dequantize(quantized, torch.float32), quantized.block).double()
    return (blocks.square() * to_blocks(h.expand(weight.shape), quantized.block)).sum(dim=1)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), block=st.sampled_from(BLOCKS), seed=st.integers(0, 99), flat=st.booleans())
def test_as_good_as_trying_one_line_after_the_other(bits: int, block: Block, seed: int, flat: bool) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 96) * 0.1 + 0.05 * seed % 3
    h = torch.ones(96) if flat else torch.rand(96) ** 6 + 1e-3
    quantized = quantize_affine(weight, block, bits, importance=h, storage=torch.float32)
    found = errors(weight, h, quantized)
    near = 1.02 if bits <= 4 else 1.2  # the more bits, the less a float32 sum can tell of two good lines
    pattern = to_blocks(h.expand(weight.shape), block)
    for error, w, own in zip(found, to_blocks(weight, block), pattern, strict=True):
        best = reference(w, own, bits)
        assert float(error) <= near * best + 1e-9 * float((own * w.double().square()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [Group(16), Group(32), Channel()])
def test_two_bytes_stand_for_scale_and_offset(bits: int, block: Block) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(5, 64) * torch.logspace(-3, 1, 5).unsqueeze(1)
    weight[2] += 10  # all of one sign: further away than the codes reach
    weight[3, :32] = 0.25
    weight[4] = 0.0
    quantized = quantize_affine(weight, block, bits, storage=None)
    compact = quantized.compact
    assert compact is not None
    assert compact.rows.dtype is torch.float16
    scale = compact.rows.float().unsqueeze(1) * compact_steps()[compact.exponents.long()]
    scale = torch.where(scale == 0, 1.0, scale)
    assert torch.equal(scale, quantized.scale)
    assert quantized.offset is not None
    assert torch.equal(-scale * (compact.zeros.float() * 2**bits / 256), quantized.offset)
    assert bool(torch.isfinite(dequantize(quantized)).all())
    assert not dequantize(quantized)[4].any()
    for row in (0, 1) if bits <= 4 else ():
        floats = quantize_affine(weight[row : row + 1], block, bits, storage=torch.float32)
        assert measure(
            weight[row : row + 1], quantize_affine(weight[row : row + 1], block, bits, storage=None)
        ).relative <= (1.2 * measure(weight[row : row + 1], floats).relative)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_as_asked_and_decoded_as_told(storage: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    quantized = quantize_affine(weight, Group(32), 4, storage=storage)
    assert quantized.offset is not None
    assert quantized.scale.dtype is quantized.offset.dtype is storage
    assert not quantized.symmetric
    codes = quantized.codes.float()
    plain = codes * expand(quantized.scale.float(), Group(32), (6, 64)) + expand(
        quantized.offset.float(), Group(32), (6, 64)
    )
    assert torch.equal(dequantize(quantized), plain.to(storage))
    # The codes are the nearest to the stored line, not to the one before it was rounded.
    nearest = (weight - expand(quantized.offset.float(), Group(32), (6, 64))) / expand(
        quantized.scale.float(), Group(32), (6, 64)
    )
    assert torch.equal(nearest.round().clamp(0, 15), codes)


def test_the_weights_that_matter_most_come_out_nearly_exactly() -> None:
    """Two numbers per block: an integer zero point has one of them."""
    torch.manual_seed(0)
    weight, h = torch.randn(256, 64), torch.full((64,), 1e-3)
    h[[3, 40]] = 1.0
    integer = errors(weight, h, quantize(weight, Group(64), 4, symmetric=False, importance=h)).sum()
    real = errors(weight, h, quantize_affine(weight, Group(64), 4, importance=h, storage=torch.float32)).sum()
    assert float(real) < 0.5 * float(integer)


def test_feedback_on_the_same_lines() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 64) @ (torch.eye(64) + 0.6 * torch.randn(64, 64) / 8)
    weight, gram = torch.randn(32, 64), inputs.T @ inputs
    quantized = quantize_affine(weight, Group(32), 3, importance=gram.diagonal(), storage=torch.float16)
    fed = feed_back(weight, quantized, inverse_factor(gram, 0.01))
    assert torch.equal(fed.scale, quantized.scale)
    assert fed.offset is quantized.offset

    def loss(made: QuantizedTensor) -> float:
        return float((inputs @ (dequantize(made, torch.float32) - weight).T).square().sum())

    assert loss(fed) < 0.9 * loss(quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(4, 32)
    weight[1, 7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_affine(weight, Group(32), 4)


def test_what_a_storage_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize_affine(torch.randn(4, 32) * 1e6, Group(32), 4, storage=torch.float16)
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize_affine(torch.randn(4, 32) * 1e7, Group(32), 4, storage=None)
    with pytest.raises(ValueError, match="reaches over rows"):
        quantize_affine(torch.randn(4, 32), Tile(2, 16), 4, storage=None)


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    weight = torch.randn(600, 1024)
    threads = torch.get_num_threads()
    made = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(quantize_affine(weight, Group(64), 4, storage=None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0].codes, made[1].codes)
    assert torch.equal(made[0].scale, made[1].scale)
