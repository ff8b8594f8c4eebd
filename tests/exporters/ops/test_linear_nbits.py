"""The operator equals numpy: every number of bits, kind of block, zero point, correction, instruction set and level."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.linear_nbits import (
    VARIANTS,
    Case,
    assert_close,
    attributes,
    bfloat_model,
    dequantize,
    initializers,
    one_node,
    random_case,
    reference,
    run,
    session,
)

# rows and columns of a block; the last means one of the whole tensor
BLOCKS = [(1, 16), (1, 32), (1, 64), (1, 128), (1, 300), (1, 10**6), (4, 32), (3, 5), (1, 1), (10**6, 10**6)]
SHAPES = [(33, 300), (16, 257), (1, 64), (50, 1), (7, 12)]  # [N, K]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = os.environ.get("SWQUANT_CPU")
    os.environ["SWQUANT_CPU"] = name
    try:
        yield
    finally:
        os.environ.pop("SWQUANT_CPU")
        if before is not None:
            os.environ["SWQUANT_CPU"] = before


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def check(
    library: Path, variants: list[str], bits: int, block: tuple[int, int], zero: str, level: int, shapes: int
) -> None:
    """`shapes` of the shapes; numbers of rows, corrections and both float types take their turns."""
    first = int(generator(bits, block, zero, level).integers(0, len(SHAPES)))
    for turn in range(first, first + shapes):
        rows, cols = SHAPES[turn % len(SHAPES)]
        rng = generator(bits, block, zero, level, turn)
        case = random_case(
            rng,
            bits=bits,
            rows=rows,
            cols=cols,
            block_rows=min(block[0], rows),
            block_cols=min(block[1], cols),
            zero=zero,
            outliers=int(rng.integers(0, 2) * 9),
            channels=int(rng.integers(0, 2) * 5),
            bias=bool(rng.integers(0, 2)),
            level=level,
            dtype=[np.float32, np.float16][int(rng.integers(0, 2))],
        )
        # The error is measured against the largest value; of a single one, nearly all could cancel out.
        count = int(rng.choice([1, 2, 3, 13, 67])) if rows > 1 else 13
        a = rng.normal(size=(count, cols)).astype(case.dtype)
        expected = reference(case, a)
        for variant in variants:
            with instruction_set(variant):
                assert_close(run(library, case, a), expected, case.dtype)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_numpy(library: Path, bits: int, block: tuple[int, int], zero: str, level: int) -> None:
    check(library, VARIANTS, bits, block, zero, level, shapes=1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_numpy_in_every_shape(library: Path, bits: int, block: tuple[int, int], zero: str) -> None:
    for level in (0, 4):
        check(library, VARIANTS, bits, block, zero, level, shapes=len(SHAPES))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("bits", range(2, 9))
def test_avx512_emulated_equals_numpy(emulated_avx512: Path, bits: int, block: tuple[int, int], level: int) -> None:
    """The AVX-512 kernels on any CPU; on one that has them, the test above runs them as they are."""
    for zero in ("none", "integer", "float"):
        check(emulated_avx512, ["avx512"], bits, block, zero, level, shapes=len(SHAPES))


@settings(max_examples=60)
@given(data=st.data())
def test_equals_numpy_whatever_the_shape(library: Path, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 70), "N")
    cols = data.draw(st.integers(1, 700), "K")
    case = random_case(
        generator(data.draw(st.integers(0, 2**16), "seed")),
        bits=data.draw(st.integers(2, 8), "bits"),
        rows=rows,
        cols=cols,
        block_rows=data.draw(st.integers(1, rows + 3), "R"),
        block_cols=data.draw(st.integers(1, cols + 20), "C"),
        zero=data.draw(st.sampled_from(["none", "integer", "float"]), "zero"),
        outliers=data.draw(st.sampled_from([0, 1, 40]), "outliers"),
        channels=data.draw(st.sampled_from([0, 1, 40]), "channels"),
        bias=data.draw(st.booleans(), "bias"),
        level=data.draw(st.sampled_from([0, 4]), "level"),
        dtype=data.draw(st.sampled_from([np.float32, np.float16]), "dtype"),
    )
    a = generator(rows, cols).normal(size=(data.draw(st.integers(0, 20), "M"), cols)).astype(case.dtype)
    with instruction_set(data.draw(st.sampled_from(VARIANTS), "cpu")):
        assert_close(run(library, case, a), reference(case, a), case.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 0, 96), (2, 3, 5, 96)], ids=str)
def test_any_rank(library: Path, shape: tuple[int, ...], level: int, variant: str) -> None:
    rng = generator(shape)
    case = random_case(rng, bits=4, rows=40, cols=96, block_cols=32, outliers=3, channels=2, bias=True, level=level)
    a = rng.normal(size=shape).astype(np.float32)
    with instruction_set(variant):
        y = run(library, case, a)
    assert y.shape == (*shape[:-1], 40)
    assert_close(y.reshape(-1, 40), reference(case, a.reshape(-1, 96)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 7, 8, 64, 65, 130])
def test_many_outliers(library: Path, rows: int, variant: str) -> None:
    """From eight rows on they are multiplied with many rows at a time."""
    case = random_case(generator(rows), bits=4, rows=50, cols=300, block_cols=32, outliers=700, bias=True)
    a = generator(rows, "a").normal(size=(rows, 300)).astype(np.float32)
    with instruction_set(variant):
        assert_close(run(library, case, a), reference(case, a))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 4])
def test_scales_in_half_beside_float_activations(library: Path, level: int, variant: str) -> None:
    case = random_case(generator(level), bits=4, rows=40, cols=96, block_cols=32, outliers=9, channels=2, level=level)
    narrow = replace(case, scales=case.scales.astype(np.float16))
    wide = replace(case, scales=narrow.scales.astype(np.float32))
    a = generator(level, "a").normal(size=(3, 96)).astype(np.float32)
    model = one_node(initializers(narrow), attributes(narrow), a.dtype)
    with instruction_set(variant):
        assert np.array_equal(session(library, model).run(None, {"A": a})[0], run(library, wide, a))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", range(2, 9))
def test_scales_and_zero_points_in_a_byte_each(library: Path, bits: int, level: int, variant: str) -> None:
    """The same bytes as from the floats that they stand for, by the formula of calibrationless.Compact."""
    rng = generator(bits, level)
    case = random_case(rng, bits=bits, rows=40, cols=90, block_cols=32, outliers=9, channels=2, level=level)
    exponents, zeros = (rng.integers(0, 256, (40, 3), dtype=np.uint8) for _ in range(2))
    row_scales = rng.uniform(0.001, 2, 40).astype(np.float16)
    factors = np.exp2(-(255 - exponents.astype(np.float64)) / 24).astype(np.float32)
    floats = replace(
        case,
        scales=row_scales.astype(np.float32)[:, None] * factors,
        zero_points=zeros.astype(np.float32) * np.float32(2**bits / 256),
    )
    constants = initializers(case) | {"scales": exponents, "zero_points": zeros, "row_scales": row_scales}
    a = generator(level, "a").normal(size=(3, 90)).astype(np.float32)
    with instruction_set(variant):
        assert np.array_equal(
            session(library, one_node(constants, attributes(case), a.dtype)).run(None, {"A": a})[0],
            run(library, floats, a),
        )


@pytest.mark.parametrize("level", [0, 4])
def test_bfloat16(library: Path, level: int) -> None:
    """Constants are chosen so that bfloat16 holds them exactly; only the result is rounded."""
    rng = generator("bfloat16", level)
    case = random_case(rng, bits=4, rows=40, cols=96, block_cols=32, level=level)
    object.__setattr__(case, "scales", np.exp2(rng.integers(-6, 0, case.scales.shape)).astype(np.float32))
    a = rng.integers(-8, 9, (5, 96)).astype(np.float32)
    y = session(library, bfloat_model(case)).run(None, {"A": a})[0]
    assert_close(y, reference(case, a), "bfloat16")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 4])
def test_threads_change_nothing(library: Path, level: int, variant: str) -> None:
    """Enough work for many tasks; the same bytes on one thread and on three."""
    rng = generator("threads")
    case = random_case(rng, bits=4, rows=1000, cols=512, block_cols=32, outliers=300, channels=4, level=level)
    a = rng.normal(size=(130, 512)).astype(np.float32)
    with instruction_set(variant):
        one = run(library, case, a)
        three = run(library, case, a, threads=3)
    assert_close(one, reference(case, a))
    assert np.array_equal(one, three)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_do_not_overflow(library: Path, bits: int, variant: str) -> None:
    """All codes at their limit, all activations at ±127: the 16-bit sums of AVX2 come closest to their end."""
    rng = generator("overflow")
    case = random_case(rng, bits=bits, rows=16, cols=512, block_cols=256, level=4)
    case.codes[:] = (1 << bits) - 1
    a = np.ones((4, 512), np.float32)
    a[2:] = -1
    with instruction_set(variant):
        assert_close(run(library, case, a), reference(case, a))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_visible(library: Path, value: float, level: int, variant: str) -> None:
    rng = generator("nan")
    case = random_case(rng, bits=4, rows=40, cols=96, block_cols=32, level=level)
    a = rng.normal(size=(3, 96)).astype(np.float32)
    expected = reference(case, a)
    a[1, 40] = value
    with instruction_set(variant):
        y = run(library, case, a)
    assert not np.isfinite(y[1][dequantize(case)[:, 40] != 0]).any()
    assert_close(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_activations_are_zero_and_not_nan(library: Path, variant: str) -> None:
    case = random_case(generator("tiny"), bits=4, rows=40, cols=96, block_cols=32, level=4)
    with instruction_set(variant):
        y = run(library, case, np.full((2, 96), 1e-42, np.float32))
    assert np.array_equal(y, np.zeros_like(y))


@pytest.mark.parametrize("variant", VARIANTS)
def test_taking_a_channel_out_saves_level_4_from_a_super_activation(library: Path, variant: str) -> None:
    """What the channels are for: one channel of 3,000 among ones of 1 ruins its block, unless it is taken out."""
    rng = generator("super activation")
    plain = random_case(rng, bits=4, rows=64, cols=512, block_cols=32, level=4)
    a = rng.normal(size=(8, 512)).astype(np.float32)

    def error(case: Case) -> float:
        exact = a.astype(np.float64) @ dequantize(plain).T
        with instruction_set(variant):
            y = run(library, case, a)
        return float(np.sqrt(np.mean((y - exact) ** 2)))

    calm = error(plain)
    a[:, 77] = 3000
    channels = np.array([77], np.int32)
    saved = replace(plain, channels=channels)
    assert error(plain) > 20 * calm
    assert error(saved) <= 2 * calm
