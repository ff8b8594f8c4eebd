"""The block of a tensor, or why it stays dense.

The safety rule lives here: a loader that ignores the sidecar must still get a working model, so a super weight is
either represented by its own block (the extreme of a block is exact) or its tensor stays dense.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import torch

from calibrationless import Block, Flat, Group, Tile, block_elements, fit
from exporters import compressed_tensors
from exporters.errors import SwquantError
from swquant.checkpoints.base import Checkpoint, Stored
from swquant.compress.options import CompressOptions
from swquant.compress.tables import Table
from swquant.models.architecture import Architecture, Dense, LinearKind, LinearWeight

__all__ = [
    "Decoded",
    "bits_of",
    "check_patterns",
    "choose_block",
    "dense_dtype",
    "expert_block",
    "shared_block",
    "table_block",
]

# Weights in a block that may hold a super weight, at 4 bits: beyond a few hundred, the step that represents it rounds
# all its neighbours to zero. Each further bit halves the step and doubles the limit.
MAX_BLOCK_WITH_SUPER_WEIGHT = 512

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Decoded(StrEnum):
    """What the modules of stock transformers cannot hold, so that it is told to decode all weights while it loads them.

    CODES: of a Conv1D, a linear layer with a forward of its own, modules that the model's own code sets up; offsets.
    ZERO_POINTS: compressed-tensors makes room for them unpacked (0.18 to 0.20) and stops where it meets packed ones.
    EMBEDDING: transformers' own code touches the weight of one, which a packed module lacks."""

    NOTHING = ""
    CODES = "codes"
    EMBEDDING = "packed embedding"
    ZERO_POINTS = "zero points"


def matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if "*" in pattern else pattern in name


def check_patterns(options: CompressOptions, names: Iterable[str]) -> None:
    """Raise SwquantError for a pattern of --dense or --bits-for that matches nothing."""
    known = tuple(names)
    patterns = [("--dense", pattern) for pattern in options.dense]
    patterns += [("--bits-for", rule.rpartition("=")[0]) for rule in options.bits_for]
    for flag, pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            raise SwquantError(f"{flag} {pattern!r} matches no tensor; names look like {known[len(known) // 2]}")


def bits_of(name: str, options: CompressOptions) -> int:
    """Bits of a tensor, if it is rounded: those of the last --bits-for that matches its name, otherwise --bits."""
    rules = [rule.rpartition("=") for rule in options.bits_for]
    return next((int(bits) for pattern, _, bits in reversed(rules) if matches(pattern, name)), options.bits)


def dense_dtype(checkpoint: Checkpoint, stored: Stored, options: CompressOptions) -> torch.dtype:
    """What a tensor's unrounded values, or its scales, are stored as. GGUF values are decoded to float32, which nobody
    wants on disk; others keep their dtype unless an option says otherwise."""
    if stored.dtype not in _FLOATS:
        return stored.dtype
    return options.parsed_dtype or checkpoint.dense_dtype(stored)


def choose_block(
    name: str,
    stored: Stored,
    linear: LinearWeight | None,
    super_weights: Sequence[tuple[int, int]],
    architecture: Architecture,
    options: CompressOptions,
    *,
    decoded: Decoded = Decoded.NOTHING,
) -> Block | Dense:
    """The block of a tensor, or why it stays dense. decoded: see `Plan`."""
    if linear is None:
        return Dense(architecture.dense.get(name, "unknown"))
    if pattern := next((pattern for pattern in options.dense if matches(pattern, name)), None):
        return Dense(f"--dense {pattern}")
    if stored.dtype not in _FLOATS:
        return Dense(f"stored as {str(stored.dtype).removeprefix('torch.')}")
    if linear.kind is LinearKind.CONV1D and decoded is not Decoded.CODES:
        return Dense("Conv1D, which compressed-tensors cannot pack (it knows nn.Linear)")
    if linear.kind is LinearKind.CUSTOM and decoded is not Decoded.CODES:
        return Dense("a linear layer with a forward of its own, which stock loaders cannot decode")
    if linear.kind is LinearKind.FUSED:
        return Dense("experts fused in one 3-D tensor: compressed-tensors has no name for a slice")
    if not name.endswith(".weight"):
        return Dense("stored under a name that does not end in .weight, which compressed-tensors cannot tell apart")
    shape = (stored.shape[0], stored.shape[1])
    block = _fitted(name, shape, options, decoded)
    if isinstance(block, Dense):
        return block
    limit = _limit(bits_of(name, options))
    if super_weights and block_elements(block, shape) > limit:
        return Dense(
            f"holds a super weight, which a block of {block_elements(block, shape)} weights cannot represent for loaders "
            f"that ignore the sidecar (limit {limit})"
        )
    return block


def table_block(
    name: str, stored: Stored, table: Table, options: CompressOptions, *, decoded: Decoded = Decoded.NOTHING
) -> Block | Dense:
    """The block of an embedding or output head, or the --dense that keeps it as it is. Raises SwquantError where it
    cannot be rounded: that was asked for."""
    if pattern := next((pattern for pattern in options.dense if matches(pattern, name)), None):
        return Dense(f"--dense {pattern}")
    block: Block | Dense = Dense(f"{str(stored.dtype).removeprefix('torch.')}, under a name that holds no codes")
    if stored.dtype in _FLOATS and name.endswith(".weight"):
        block = _fitted(name, (stored.shape[0], stored.shape[1]), options, decoded)
    if isinstance(block, Dense):
        raise SwquantError(f"{table.asked}: {name} cannot be rounded ({block.reason}); leave it out")
    return block


def _fitted(name: str, shape: tuple[int, int], options: CompressOptions, decoded: Decoded) -> Block | Dense:
    """The block asked for, or a smaller one that divides a weight. Raises SwquantError for --strict-block, and for one
    that cannot be stored."""
    block = fit(options.parsed_block, shape)
    if decoded and block != options.parsed_block:
        return Dense(f"block {options.parsed_block}, which all weights share, does not divide it")
    if block is None or (options.strict_block and block != options.parsed_block):
        problem = f"block {options.block_name} does not divide {_dimension(options.parsed_block, shape)} of {name}"
        if options.strict_block:
            raise SwquantError(f"{problem}; use {remedy(options.parsed_block, shape)}")
        return Dense(f"{problem} and no power of two from 16 does")
    if options.layout.express(block, shape) is None:
        rows = "" if options.offset_kind != "none" else f", or a flat block that is a multiple of {shape[1]}"
        raise SwquantError(
            f"{options.layout.name} cannot store block {block} on {name} {list(shape)}; "
            f"use {remedy(Group(128), shape)}{rows}"
        )
    return block


def shared_block(checkpoint: Checkpoint, names: Iterable[str], options: CompressOptions) -> Block:
    """The one block that most of these weights can share, where they all have to: the one asked for, fitted to what
    their shapes have in common. Those that no part of it divides are not asked."""
    stored = [checkpoint.tensors[name].shape for name in names]
    shapes = [(shape[0], shape[1]) for shape in stored if len(shape) == 2]
    shapes = [shape for shape in shapes if fit(options.parsed_block, shape) is not None]
    if not shapes:
        return options.parsed_block
    return fit(options.parsed_block, _common(shapes)) or options.parsed_block


def _common(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """What the outputs, and the inputs, of all shapes have in common."""
    rows, cols = zip(*shapes, strict=True)
    return math.gcd(*rows), math.gcd(*cols)


def _limit(bits: int) -> int:
    return MAX_BLOCK_WITH_SUPER_WEIGHT << max(0, bits - 4)


_EXPERTS = "transformers loads a mixture only if all its experts are packed with one symmetric scheme"


def expert_block(
    checkpoint: Checkpoint,
    architecture: Architecture,
    coordinates: Mapping[str, Sequence[tuple[int, int]]],
    options: CompressOptions,
) -> Block | None:
    """The one block that all experts share, None where there are no experts. Raises SwquantError where there cannot be
    one: a checkpoint whose experts are partly dense does not load."""
    names = [name for name, linear in architecture.weights.items() if linear.kind is LinearKind.EXPERT]
    if not names:
        return None
    if not options.symmetric:
        raise SwquantError(f"{_EXPERTS}; use --symmetric")
    for pattern in options.dense:
        if matched := next((name for name in names if matches(pattern, name)), None):
            raise SwquantError(f"--dense {pattern} matches {matched}, but {_EXPERTS}; give a narrower pattern")
    if len(bits := {bits_of(name, options): name for name in names}) > 1:
        (one, first), (other, second) = list(bits.items())[:2]
        raise SwquantError(
            f"--bits-for gives {first} {one} bits and {second} {other}, but {_EXPERTS}; give a pattern that all of them match"
        )
    limit = _limit(next(iter(bits)))
    if odd := next((name for name in names if checkpoint.tensors[name].dtype not in _FLOATS), None):
        raise SwquantError(
            f"{odd} is stored as {checkpoint.tensors[odd].dtype}, but {_EXPERTS}; convert it to bfloat16"
        )
    shapes = [(checkpoint.tensors[name].shape[0], checkpoint.tensors[name].shape[1]) for name in names]
    common = _common(shapes)
    block = fit(options.parsed_block, common)
    carried = {compressed_tensors.express(block, shape) for shape in shapes} if block else {None}
    if block is None or len(carried) > 1 or None in carried:
        raise SwquantError(
            f"block {options.block_name} cannot be the same for experts of {common[1]} common inputs, but {_EXPERTS}; "
            f"use {remedy(options.parsed_block, common)}"
        )
    if options.strict_block and block != options.parsed_block:
        raise SwquantError(
            f"block {options.block_name} does not divide {names[0]}; use {remedy(options.parsed_block, common)}"
        )
    for name, shape in zip(names, shapes, strict=True):
        if coordinates.get(name) and block_elements(block, shape) > limit:
            raise SwquantError(
                f"{name} holds a super weight, which a block of {block_elements(block, shape)} weights cannot represent, but "
                f"{_EXPERTS}; use a block of at most {limit} weights, for example --block 128"
            )
    return block


def _dimension(block: Block, shape: tuple[int, int]) -> str:
    match block:
        case Flat():
            return f"the {shape[0] * shape[1]} weights"
        case Tile():
            return f"shape {list(shape)}"
        case _:
            return f"in_features {shape[1]}"


def remedy(block: Block, shape: tuple[int, int]) -> str:
    """Sizes near the one asked for that do divide the inputs, and `channel`."""
    size = block.cols if isinstance(block, Tile) else getattr(block, "size", 128)
    divisors = [number for number in range(16, shape[1] + 1) if shape[1] % number == 0]
    below = [number for number in divisors if number <= size][-1:]
    above = [number for number in divisors if number > size][:1]
    return ", ".join(map(str, below + above)) + (" or channel" if below + above else "channel")
