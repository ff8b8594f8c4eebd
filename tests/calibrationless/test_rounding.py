"""Rounding against a loop in double precision, and the promises that the module makes about errors."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.strategies import blocks_that_divide, dtypes, widths

from calibrationless import (
    Block,
    Channel,
    Clip,
    Flat,
    Group,
    QuantizedTensor,
    Tile,
    Whole,
    clip_threshold,
    dequantize,
    expand,
    quantize,
    round_to_codes,
    to_blocks,
)

EVERY_KIND = [Group(8), Tile(4, 8), Channel(), Whole(), Flat(12)]
CLIPS = [None, Clip("z", 2.0), Clip("iqr", 1.5), Clip("quantile", 0.8)]


def heavy_tailed_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """With a magnitude between 0.001 and 1000 that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return (wide * 10.0 ** (seed % 7 - 3)).to(dtype)


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, Block]:
    block, shape = draw(blocks_that_divide())
    return heavy_tailed_weight(shape, draw(dtypes), draw(st.integers(0, 999))), block


def stored(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).to(dtype).item()


def reference_scale(block: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[float, int]:
    """(scale, zero point) of one block, by the formulas at the head of rounding.py."""
    if symmetric:
        signed_max = max(block) if max(block) >= -min(block) else min(block)
        return stored(signed_max / -(2 ** (bits - 1)), dtype) or 1.0, 2 ** (bits - 1)
    low, high = min(*block, 0.0), max(*block, 0.0)
    scale = stored((high - low) / (2**bits - 1), dtype) or 1.0
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def near_a_tie(steps: float) -> bool:
    return abs(steps - math.floor(steps) - 0.5) < 1e-4


@given(weights(), widths, st.booleans())
@settings(max_examples=60)
def test_scale_zero_point_and_codes_are_those_of_a_loop_in_double_precision(case, bits, symmetric):
    weight, block = case
    quantized = quantize(weight, block, bits, symmetric=symmetric)
    assert (quantized.codes.dtype, quantized.scale.dtype) == (torch.uint8, weight.dtype)
    assert (quantized.block, quantized.bits, quantized.symmetric) == (block, bits, symmetric)
    codes = to_blocks(quantized.codes, block).tolist()
    zeros = [2 ** (bits - 1)] * len(codes) if symmetric else quantized.zero_point.flatten().tolist()
    for index, values in enumerate(to_blocks(weight, block).double().tolist()):
        scale, zero = reference_scale(values, bits, symmetric, weight.dtype)
        assert quantized.scale.flatten()[index].item() == pytest.approx(
            scale, rel=3e-7 if weight.dtype is torch.float32 else 0
        )
        scale = quantized.scale.flatten()[index].item()
        if not near_a_tie(min(*values, 0.0) / scale):
            assert zeros[index] == zero
        for value, code in zip(values, codes[index], strict=True):
            if not near_a_tie(value / scale):
                assert code == min(max(round(value / scale) + zeros[index], 0), 2**bits - 1)


def test_a_tie_goes_to_the_even_code():
    steps = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert round_to_codes(steps, torch.ones(1, 1), None, 4).tolist() == [[6, 6, 8, 8, 10, 10]]
    zero_point = torch.tensor([[3]], dtype=torch.uint8)
    assert round_to_codes(steps, torch.ones(1, 1), zero_point, 4).tolist() == [[1, 1, 3, 3, 5, 5]]


@given(weights(), widths, st.booleans())
@settings(max_examples=60)
def test_no_error_exceeds_half_a_step_but_at_the_end_without_a_mirror_image(case, bits, symmetric):
    weight, block = case
    quantized = quantize(weight, block, bits, symmetric=symmetric)
    exact = weight.double()
    error = (exact - dequantize(quantized).double()).abs()
    scale = expand(quantized.scale, block, tuple(weight.shape)).double()
    blocks = to_blocks(exact, block)
    span = (blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)).unsqueeze(1)
    rounded = 2 * torch.finfo(weight.dtype).eps  # the scale, and the product
    slack = expand(span * rounded, block, tuple(weight.shape))
    mirrored = exact / scale > 2 ** (bits - 1) - 0.5 if symmetric else torch.zeros_like(error, dtype=torch.bool)
    assert bool((error <= scale.abs() / 2 + slack)[~mirrored].all())
    assert bool((error <= scale.abs() + slack)[mirrored].all())


@given(weights(), widths)
def test_the_extreme_of_a_block_is_exact_with_a_signed_scale(case, bits):
    weight, block = case
    quantized = quantize(weight, block, bits)
    decoded = to_blocks(dequantize(quantized), block)
    for values, found, scale in zip(to_blocks(weight, block), decoded, quantized.scale.flatten(), strict=True):
        extreme = values.max() if values.max() >= -values.min() else values.min()
        assume(extreme.abs() >= 2**bits * torch.finfo(weight.dtype).smallest_normal)
        assert bool((found[values == extreme] == extreme).all())
        assert torch.sign(scale) == -torch.sign(extreme)


@given(weights(), widths)
def test_zero_is_exact_in_every_asymmetric_block(case, bits):
    weight, block = case
    weight[torch.rand(weight.shape) < 0.3] = 0
    decoded = dequantize(quantize(weight, block, bits, symmetric=False))
    assert bool((decoded[weight == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_of_zeros_decodes_to_zeros_beside_others(dtype, clip, symmetric):
    weight = heavy_tailed_weight((3, 16), dtype)
    weight[1] = 0
    quantized = quantize(weight, Channel(), 3, symmetric=symmetric, clip=clip)
    decoded = dequantize(quantized)
    assert bool((decoded[1] == 0).all())
    assert bool(decoded.isfinite().all())
    assert bool((decoded[0] != 0).any())
    assert quantized.scale[1].item() == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_subnormal_weights_lose_no_more_than_subnormal_steps(bits, symmetric):
    tiny = 2.0**-24  # the smallest float16
    weight = (torch.arange(-60, 61).double() * tiny).to(torch.float16).reshape(11, 11)
    step = 120 / (2**bits - 1)  # of the widest block, in units of `tiny`
    for block in (Channel(), Whole(), Flat(1)):
        decoded = dequantize(quantize(weight, block, bits, symmetric=symmetric))
        assert float((weight.double() - decoded.double()).abs().max()) <= (step + 2**bits) * tiny


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("block", EVERY_KIND, ids=str)
def test_one_weight_that_is_not_finite_is_refused_wherever_it_is(block, clip, symmetric, value):
    for position in (0, 77, 191):
        weight = heavy_tailed_weight((8, 24))
        weight.view(-1)[position] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(weight, block, 4, symmetric=symmetric, clip=clip)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_does_not_fit_its_dtype_is_refused_with_the_dtype(symmetric):
    with pytest.raises(ValueError, match=r"scale of .*e\+0[56] does not fit float16"):
        quantize(torch.tensor([[1e7, -1.0]]), Channel(), 4, symmetric=symmetric, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("values", "dtype", "bits", "symmetric"),
    [
        ([5e5, 1.0], torch.float16, 4, True),  # the scale fits float16, eight times it does not
        ([5e5, 1.0], torch.float16, 4, False),
        ([60000.0, -60000.0], torch.float16, 2, False),
        ([3.4e38, 1.0], torch.bfloat16, 4, True),  # the scale is rounded up to 2^125
    ],
)
def test_finite_weights_are_refused_rather_than_decoded_to_infinity(values, dtype, bits, symmetric):
    try:
        quantized = quantize(torch.tensor([values]), Channel(), bits, symmetric=symmetric, scale_dtype=dtype)
    except ValueError:
        return
    assert bool(dequantize(quantized).isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", CLIPS[1:], ids=str)
@pytest.mark.parametrize("block", EVERY_KIND, ids=str)
def test_clipping_equals_rounding_a_clamped_weight_but_where_the_extreme_is_kept(block, clip, symmetric):
    weight = heavy_tailed_weight((8, 24))
    blocks = to_blocks(weight, block)
    spared = torch.arange(len(blocks)) % 3 == 1
    threshold = expand(clip_threshold(blocks, clip).squeeze(1).masked_fill(spared, torch.inf), block, (8, 24))
    found = quantize(weight, block, 4, symmetric=symmetric, clip=clip, keep_extreme=spared)
    assert bool((weight.abs() > threshold).any())
    assert same(found, quantize(torch.clamp(weight, -threshold, threshold), block, 4, symmetric=symmetric))


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    zeros = (one.zero_point is None and other.zero_point is None) or torch.equal(one.zero_point, other.zero_point)
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale) and zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_a_weight_of_several_pieces_is_rounded_as_its_parts_are_and_left_as_it_was(clip, symmetric):
    weight = heavy_tailed_weight((1031, 640))  # more than one piece, and the last is not full
    before = weight.clone()
    spared = torch.arange(1031 * 10) % 3 == 0
    whole = quantize(weight, Group(64), 4, symmetric=symmetric, clip=clip, keep_extreme=spared)
    assert torch.equal(weight, before)
    for rows in (slice(0, 7), slice(815, 825), slice(1020, 1031)):
        its_spared = spared.view(1031, 10)[rows].flatten()
        part = quantize(weight[rows].clone(), Group(64), 4, symmetric=symmetric, clip=clip, keep_extreme=its_spared)
        assert torch.equal(whole.codes[rows], part.codes)
        assert torch.equal(whole.scale[rows], part.scale)
        assert symmetric or torch.equal(whole.zero_point[rows], part.zero_point)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("block", [Group(64), Tile(64, 32), Channel(), Whole(), Flat(96)], ids=str)
def test_the_bytes_do_not_depend_on_the_number_of_threads(block, clip):
    weight, threads = heavy_tailed_weight((320, 192)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantize(weight, block, 5, symmetric=False, clip=clip)
        torch.set_num_threads(2)
        assert same(quantize(weight, block, 5, symmetric=False, clip=clip), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [3, 1031])
def test_a_parameter_is_rounded_like_the_tensor_in_it(rows):
    parameter = torch.nn.Parameter(heavy_tailed_weight((rows, 640)))
    expected = quantize(parameter.data, Group(64), 4, clip=Clip("z", 2.0))
    assert same(quantize(parameter, Group(64), 4, clip=Clip("z", 2.0)), expected)
    with torch.no_grad():
        assert same(quantize(parameter, Group(64), 4, clip=Clip("z", 2.0)), expected)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_outside_two_to_eight_are_refused_with_the_range(bits):
    with pytest.raises(ValueError, match=f"bits {bits} is outside 2 to 8"):
        quantize(torch.ones(2, 2), Channel(), bits)
