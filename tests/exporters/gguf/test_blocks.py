"""Every type of block, read by the gguf package: what it decodes to is what the codes stand for, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrationless import Channel, Evidence, Group, QuantizedTensor, Recipe, Tile, dequantize, follow, quantize
from calibrationless.affine import quantize_affine
from exporters.gguf.blocks import TYPES, BlockType, encode, recipe_type, type_of


def in_float32(quantized: QuantizedTensor) -> QuantizedTensor:
    offset = None if quantized.offset is None else quantized.offset.float()
    return replace(quantized, scale=quantized.scale.float(), offset=offset)


def check(quantized: QuantizedTensor, kind: BlockType) -> None:
    stored = encode(quantized, kind)
    assert stored.dtype is torch.uint8
    assert tuple(stored.shape) == (quantized.shape[0], kind.row_bytes(quantized.shape[1]))
    decoded = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind.name]))
    assert torch.equal(decoded, dequantize(in_float32(quantized)))


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 7), units=st.integers(1, 5), seed=st.integers(0, 99), prompt=st.booleans())
def test_the_package_reads_what_is_written(name: str, rows: int, units: int, seed: int, prompt: bool) -> None:
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, units * kind.weights, generator=generator)
    importance = torch.rand(weight.shape[1], generator=generator) if prompt else None
    recipe = Recipe(Group(kind.block), kind.bits, offsets=kind.offsets, scale_dtype=torch.float16)
    quantized = follow(recipe, weight, Evidence(importance=importance)).quantized
    assert recipe_type(recipe) is kind
    assert type_of(quantized) is kind
    check(quantized, kind)


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_any_codes_at_all(name: str, seed: int) -> None:
    """Codes and integers over their whole range, which a search would never give."""
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2 * kind.weights, generator=generator)
    recipe = Recipe(Group(kind.block), kind.bits, offsets=kind.offsets, scale_dtype=torch.float16)
    quantized = follow(recipe, weight).quantized
    codes = torch.randint(0, 1 << kind.bits, weight.shape, generator=generator).to(torch.uint8)
    quantized = replace(quantized, codes=codes)
    if (parts := quantized.super_blocks) is not None:
        low, high = (-128, 128) if kind.bits == 6 else (0, 64)
        scales = torch.randint(low, high, parts.scales.shape, generator=generator).to(torch.int16)
        mins = (
            None if parts.mins is None else torch.randint(0, 64, parts.mins.shape, generator=generator).to(torch.uint8)
        )
        per = parts.scales.shape[1] // parts.steps.shape[1]
        scale = parts.steps.float().repeat_interleave(per, 1) * scales.float()
        offset = None
        if parts.lows is not None:
            assert mins is not None
            offset = -parts.lows.float().repeat_interleave(per, 1) * mins.float()
        quantized = replace(
            quantized, scale=scale, offset=offset, super_blocks=replace(parts, scales=scales, mins=mins)
        )
    check(quantized, kind)


@pytest.mark.parametrize("block", [Group(64), Group(128), Channel()])
def test_larger_blocks_repeat_their_scale(block: Group | Channel) -> None:
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    check(quantize(weight, block, 4, scale_dtype=torch.float16), TYPES["Q4_0"])
    check(quantize(weight, block, 8, scale_dtype=torch.float16), TYPES["Q8_0"])
    check(quantize_affine(weight, block, 4), TYPES["Q4_1"])


def test_what_fits_none_is_told() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    half = torch.float16
    for quantized, why in (
        (quantize(weight, Group(32), 3, scale_dtype=half), "codes of 3 bits; a GGUF block holds 4, 5, 8$"),
        (
            quantize(weight, Group(16), 4, scale_dtype=half),
            "blocks of 16; a GGUF block is 32 inputs: compress with --block 32",
        ),
        (quantize(weight, Group(48), 4, scale_dtype=half), "blocks of 48"),
        (quantize(weight, Tile(2, 32), 4, scale_dtype=half), "blocks of 2x32"),
        (quantize(weight, Group(32), 4, symmetric=False, scale_dtype=half), "integer zero points"),
        (quantize_affine(weight, Group(32), 8), "codes of 8 bits; a GGUF block holds 4, 5 with offsets"),
        (quantize_affine(weight, Group(32), 4, storage=None), "offsets of a byte"),
        (quantize(weight, Group(32), 4, scale_dtype=torch.float32), "a scale that float16 does not hold exactly"),
    ):
        told = type_of(quantized)
        assert isinstance(told, str)
        assert re.search(why, told), told


def test_the_table_is_ggmls() -> None:
    for name, kind in TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert int(number) == kind.number
        assert gguf.GGML_QUANT_SIZES[number] == (kind.weights, kind.nbytes)
        assert gguf.LlamaFileType(kind.file_type).name.startswith(f"MOSTLY_{name}")
        assert kind.fallback is None or TYPES[kind.fallback].weights == 32
