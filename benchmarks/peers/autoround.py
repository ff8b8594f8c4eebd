"""AutoRound: its roundings at once, its search over scales and zero points (NeUQI), and its 200 steps on text.

    RTN          the function that its own mode without steps (`--iters 0`) finds in its registry, from weights alone
    NeUQI        the same with `--enable_neuqi`: 96 scales per block, and every zero point for each of them. Its command
                 line weighs the error with the inputs of its calibration text; the three rows weigh it with nothing,
                 with the inputs on swquant's prompt, and with those on the text. The search is compiled where there is
                 a C++ compiler, and takes ten times as long elsewhere
    200 steps    SignRound, what AutoRound is known for: rounding and clipping of each layer trained on its outputs

The file is not named like the package: scripts in this folder would import it in its place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.base import (
    PLAIN,
    PROMPT,
    TEXT,
    Cell,
    Importance,
    Method,
    Original,
    Outcome,
    Rounded,
    each_weight,
    gather,
    group_of,
)

__all__ = ["METHODS"]

PACKAGES = ("auto-round",)
BLOCKS = (Cell(4, "32"), Cell(4, "64"))
SEARCH = {"AR_NEUQI_BACKEND": "compile", "AR_NEUQI_COARSE": "64", "AR_NEUQI_FINE": "32"}  # the grid that CPUs have
STEPS, BATCH = 200, 4


def stored(weights: int, cell: Cell, blocks: int, symmetric: bool) -> float:
    """Bytes of codes, 16-bit scales, and zero points as large as a code."""
    return (weights * cell.bits + blocks * (16 if symmetric else 16 + cell.bits)) / 8


def rounded(weight: Tensor, cell: Cell, importance: Tensor | None = None, *, sym: bool, **options: Any) -> Rounded:
    """options: of AutoRound's registry."""
    from auto_round.data_type.utils import get_quant_func

    group = group_of(cell, weight.shape[1])
    function, _ = get_quant_func("int", cell.bits, sym=sym, iters=0, **options)
    weighed = {} if importance is None else {"imatrix": importance}
    _, scale, zero = function(weight, bits=cell.bits, group_size=group, **weighed)
    blocks = weight.reshape(-1, group)
    half = 2 ** (cell.bits - 1)
    if sym:
        codes = (blocks / scale).round().clamp(-half, half - 1)
    else:
        codes = (blocks / scale).round().add(zero).clamp(0, 2 * half - 1) - zero
    decoded = (codes * scale.half().float()).reshape(weight.shape)
    return Rounded(decoded, stored(weight.numel(), cell, len(blocks), sym))


def at_once(symmetric: bool, optimized: bool) -> Callable[[Original, Cell], Outcome]:
    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        return rounded(weight, cell, sym=symmetric, disable_opt_rtn=not optimized)

    return each_weight(round_one)


def searched(importance: Importance) -> Callable[[Original, Cell], Outcome]:
    def run(original: Original, cell: Cell) -> Outcome:
        os.environ |= SEARCH
        torch.compiler.reset()  # beyond 64 compiled shapes it goes on uncompiled, and says nothing
        weights = importance.of(original)

        def one(name: str) -> Rounded:
            return rounded(original.checkpoint.read(name), cell, weights.get(name), sym=False, enable_neuqi=True)

        return gather((name, one(name)) for name in original.linears)

    return run


def tuned(original: Original, cell: Cell) -> Outcome:
    """Its defaults, in float32. The model that it leaves behind holds decoded weights; all else is as it was."""
    from auto_round import AutoRound

    size = int(cell.block)
    rounder = AutoRound(
        str(original.folder),
        original.checkpoint.tokenizer(),
        bits=cell.bits,
        group_size=size,
        sym=True,
        dataset=[{"input_ids": ids.unsqueeze(0)} for ids in original.calibration_ids],
        iters=STEPS,
        nsamples=original.windows,
        seqlen=original.window,
        batch_size=BATCH,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    result, _ = rounder.quantize()
    state = {name: result.get_parameter(name).detach().float() for name in original.linears}
    blocks = sum(weight.shape[0] * math.ceil(weight.shape[1] / size) for weight in state.values())  # rows are padded
    return Outcome(state, stored(blocks * size, cell, blocks, True))


METHODS = [
    Method("AutoRound RTN", PACKAGES, "get_quant_func('int', sym=True, disable_opt_rtn=True)", at_once(True, False)),
    Method(
        "AutoRound RTN asymmetric",
        PACKAGES,
        "get_quant_func('int', sym=False, disable_opt_rtn=True)",
        at_once(False, False),
    ),
    Method("AutoRound opt-RTN", PACKAGES, "get_quant_func('int', sym=True)", at_once(True, True)),
    *(
        Method(
            f"AutoRound NeUQI{importance.name}",
            PACKAGES,
            f"get_quant_func('int', sym=False, enable_neuqi=True), imatrix={matrix}",
            searched(importance),
            (*BLOCKS, Cell(3, "64")),
            importance.calibrated,
        )
        for importance, matrix in (
            (PLAIN, "None"),
            (PROMPT, "energy of the inputs on swquant's prompt"),
            (TEXT, "mean squares over the calibration text"),
        )
    ),
    Method("AutoRound, 200 steps", PACKAGES, "AutoRound(sym=True, iters=200).quantize()", tuned, BLOCKS, True),
]
