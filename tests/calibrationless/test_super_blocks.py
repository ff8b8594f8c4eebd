"""K-quants: what the integers stand for, that the search is no worse than a plain one, extremes, super weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretended import GPU, pretended_gpu
from torch import Tensor

from calibrationless import (
    SUPER_KINDS,
    Evidence,
    Group,
    QuantizedTensor,
    Recipe,
    dequantize,
    feed_back,
    follow,
    inverse_factor,
    loops,
    moved,
    quantize_affine,
    quantize_super_blocks,
)

BITS = sorted(SUPER_KINDS)


def weight_and_importance(rows: int = 6, columns: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    return weight, torch.exp(2 * torch.randn(columns, generator=generator))


def cost(weight: Tensor, quantized: QuantizedTensor, importance: Tensor) -> float:
    return float(((dequantize(quantized) - weight).double().square() * importance).sum())


def plain(weight: Tensor, bits: int, importance: Tensor) -> Tensor:
    """The lines of `affine`, brought to 6 bits of the largest each: no search of what the integers cost."""
    lines = quantize_affine(weight, Group(32), bits, importance=importance, storage=torch.float32)
    assert lines.offset is not None
    scale, offset = (values.view(len(weight), -1, 8).double() for values in (lines.scale, lines.offset.clamp(max=0)))
    unit, low = scale.amax(-1, keepdim=True) / 63, (-offset).amax(-1, keepdim=True) / 63
    unit, low = unit.half().double(), low.half().double()
    scale = (unit * (scale / unit).round()).view(len(weight), -1, 1)
    offset = (-low * (-offset / low).round()).view(len(weight), -1, 1)
    blocks = weight.view(len(weight), -1, 32).double()
    codes = ((blocks - offset) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + offset).view_as(weight)


@pytest.mark.parametrize("bits", [4, 5])
def test_it_beats_the_integers_nearest_to_the_lines(bits: int) -> None:
    for seed in range(3):
        weight, importance = weight_and_importance(seed=seed)
        ours = cost(weight, quantize_super_blocks(weight, bits, importance=importance), importance)
        theirs = float(((plain(weight, bits, importance) - weight).double().square() * importance).sum())
        assert ours < 0.97 * theirs


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_cost_less_and_importance_helps(bits: int) -> None:
    weight, importance = weight_and_importance()
    found = quantize_super_blocks(weight, bits, importance=importance)
    assert cost(weight, found, importance) < cost(weight, quantize_super_blocks(weight, bits), importance)
    if bits > BITS[0]:
        assert cost(weight, found, importance) < 0.5 * cost(
            weight, quantize_super_blocks(weight, bits - 1, importance=importance), importance
        )


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_integers_stand_for_scale_and_offset(bits: int, data: st.DataObject) -> None:
    """Whatever a super-block holds: zeros, constants, one sign, tiny and large numbers."""
    kinds = st.sampled_from(["normal", "zero", "constant", "negative", "positive", "tiny", "large", "spike"])
    rows = data.draw(st.lists(kinds, min_size=1, max_size=4))
    weight, importance = weight_and_importance(len(rows), 256, data.draw(st.integers(0, 9)))
    for row, kind in enumerate(rows):
        change = {
            "normal": lambda values: values,
            "zero": torch.zeros_like,
            "constant": lambda values: torch.full_like(values, float(values[0])),
            "negative": lambda values: -values.abs() - 0.5,
            "positive": lambda values: values.abs() + 0.5,
            "tiny": lambda values: values * 1e-7,
            "large": lambda values: values * 1e4,
            "spike": lambda values: values.index_fill(0, torch.tensor([17]), 9.0),
        }[kind]
        weight[row] = change(weight[row])
    found = quantize_super_blocks(weight, bits, importance=importance)
    parts, kind_of = found.super_blocks, SUPER_KINDS[bits]
    assert parts is not None
    assert found.block == Group(kind_of.block)
    per = 256 // kind_of.block
    scale = parts.steps.float().repeat_interleave(per, 1) * parts.scales.float()
    assert torch.equal(found.scale, scale)
    assert bool((scale != 0).all())
    assert int(parts.scales.abs().max()) <= kind_of.limit
    if kind_of.offsets:
        assert parts.lows is not None
        assert parts.mins is not None
        assert found.offset is not None
        assert torch.equal(found.offset, -parts.lows.float().repeat_interleave(per, 1) * parts.mins.float())
        assert int(parts.mins.max()) <= kind_of.limit
    spread = weight.abs().amax(1, keepdim=True)
    error = (dequantize(found) - weight).abs()
    assert bool((error[[kind in ("zero", "constant") for kind in rows]] <= 0.02 * spread.max()).all())
    assert bool((error <= 1.0 * spread + 2e-6).all())


@pytest.mark.parametrize("bits", BITS)
def test_a_super_weight_comes_out_nearly_exact(bits: int) -> None:
    weight, _ = weight_and_importance()
    weight[2, 300], weight[4, 5] = 3.7, -2.9
    recipe = Recipe(Group(32), bits, offsets="super", super_weights=((2, 300), (4, 5)))
    decoded = dequantize(follow(recipe, weight).quantized)
    assert float((decoded[2, 300] - 3.7).abs()) < 0.01
    assert float((decoded[4, 5] + 2.9).abs()) < 0.01


@pytest.mark.parametrize("bits", BITS)
def test_feedback_changes_codes_alone(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    weight, _ = weight_and_importance(8, 256)
    weight[1] = 0
    gram = inputs.T @ inputs
    found = quantize_super_blocks(weight, bits, importance=gram.diagonal())
    fed = feed_back(weight, found, inverse_factor(gram, 0.1))
    assert fed.super_blocks is found.super_blocks
    before, after = (float(((dequantize(one) - weight) @ inputs.T).square().sum()) for one in (found, fed))
    assert after < 0.8 * before


def test_bad_input_is_refused() -> None:
    weight, importance = weight_and_importance()
    with pytest.raises(ValueError, match="of 3 bits do not exist; use 4, 5, 6"):
        quantize_super_blocks(weight, 3)
    with pytest.raises(ValueError, match="in_features 500 is not a multiple of 256"):
        quantize_super_blocks(weight[:, :500], 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_super_blocks(weight.index_fill(1, torch.tensor([7]), torch.nan), 4)
    with pytest.raises(ValueError, match="does not fit float16"):
        quantize_super_blocks(weight * 1e9, 4, importance=importance)
    with pytest.raises(ValueError, match="512 finite numbers"):
        quantize_super_blocks(weight, 4, importance=importance[:-1])


def test_it_does_not_depend_on_threads_or_pieces() -> None:
    weight, importance = weight_and_importance(3000, 256)
    whole = quantize_super_blocks(weight, 4, importance=importance)
    part = quantize_super_blocks(weight[2500:], 4, importance=importance)
    assert torch.equal(whole.codes[2500:], part.codes)


def odd_weight() -> tuple[Tensor, Tensor]:
    """Super-blocks of zeros, of one number, of one sign, of numbers at float16's ends, and ordinary ones."""
    weight, importance = weight_and_importance(40, 512)
    weight[3], weight[5, :256], weight[7], weight[9] = 0.0, 0.25, weight[7].abs(), -weight[9].abs()
    weight[11], weight[13, 40:60] = weight[11] * 1e-7, 0.0
    importance[20:24] = 0.0
    return weight, importance


@pytest.mark.parametrize("bits", BITS)
def test_batched_torch_finds_what_the_compiled_loop_finds(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = odd_weight()
    recipe = Recipe(Group(32), bits, offsets="super")
    compiled = follow(recipe, weight, Evidence(importance, importance))
    monkeypatch.setattr(loops, "COMPILED", frozenset())
    plain = follow(recipe, weight, Evidence(importance, importance))
    for rows in range(len(weight)):
        part = slice(rows, rows + 1)
        ours, theirs = (
            float(((dequantize(one.quantized)[part] - weight[part]).double().square() * importance).sum())
            for one in (plain, compiled)
        )
        assert ours == pytest.approx(theirs, rel=0.05, abs=1e-6 * float(weight[part].square().sum())), rows
    assert plain.error.output == pytest.approx(compiled.error.output, rel=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_another_device_gives_what_batched_torch_gives_on_the_cpu(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "COMPILED", frozenset())
    weight, importance = (values[..., :256] for values in odd_weight())
    weight = weight[:12].contiguous()
    inputs = torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(Group(32), bits, offsets="super", super_weights=((2, 5),))
    for evidence in (Evidence(), Evidence(importance, importance, inverse_factor(inputs.T @ inputs))):
        here = follow(recipe, weight, evidence)
        with pretended_gpu() as gpu:
            there = follow(recipe, weight.to(gpu), moved(evidence, gpu))
            assert there.quantized.codes.device == GPU
            back = moved(there, "cpu")
        assert torch.equal(back.quantized.codes, here.quantized.codes)
        for name, value in vars(here.quantized.super_blocks).items():
            assert value is None or torch.equal(getattr(back.quantized.super_blocks, name), value), name
        assert back.error == here.error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", BITS)
def test_a_gpu_is_as_good_as_the_compiled_loop(bits: int) -> None:
    weight, importance = weight_and_importance(512, 4096)
    recipe, evidence = Recipe(Group(32), bits, offsets="super"), Evidence(importance, importance)
    here = follow(recipe, weight, evidence)
    there = moved(follow(recipe, weight.cuda(), moved(evidence, "cuda")), "cpu")
    assert there.error.output == pytest.approx(here.error.output, rel=1e-3)
    assert float((there.quantized.codes != here.quantized.codes).float().mean()) < 0.02
