"""Data-free peers that are Python packages: HQQ, bitsandbytes, SINQ and torchao."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peers.base import CELLS, Cell, Method, Rounded, each_weight, group_of

__all__ = ["METHODS"]

RoundOne = Callable[[Tensor, Cell], Rounded]
FOUR_BITS = tuple(cell for cell in CELLS if cell.bits == 4)
THREE_BITS = tuple(cell for cell in CELLS if cell.bits == 3)


def hqq(weight: Tensor, cell: Cell) -> Rounded:
    """Its default settings for these bits (`hqq_base_quant_config`), axis 1, which its fast kernels want."""
    from hqq.core.quantize import Quantizer, hqq_base_quant_config

    config = hqq_base_quant_config(nbits=cell.bits, group_size=group_of(cell, weight.shape[1]), axis=1)
    packed, meta = Quantizer.quantize(weight, device="cpu", **config["weight_quant_params"])
    meta |= {key: meta[key].half().float() for key in ("scale", "zero")} | {"compute_dtype": torch.float32}
    nbytes = packed.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())
    return Rounded(Quantizer.dequantize(packed, meta), nbytes)


def bitsandbytes(weight: Tensor, cell: Cell) -> Rounded:
    """NF4 with its second-level 8-bit scales. Blocks run through the flat tensor and are powers of two."""
    from bitsandbytes import functional

    block = 1 << (weight.shape[1].bit_length() - 1) if cell.block == "channel" else int(cell.block)
    packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=True, quant_type="nf4")
    nbytes = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    return Rounded(functional.dequantize_4bit(packed, state), nbytes)


def sinq(method: str) -> RoundOne:
    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        """Q * scale * column scale with its Sinkhorn normalization, tiles along a row ("1D", its default)."""
        from sinq.dual_shift import NF3_CODEBOOK, NF4_CODEBOOK, tiled_quant_rectangle

        group = group_of(cell, weight.shape[1])
        codes, scale, columns, zero = tiled_quant_rectangle(weight, [0, 2**cell.bits - 1], group, method=method)
        scale, columns, zero = (part.half().float() for part in (scale, columns, zero))
        if method != "sinq":
            codes = (NF4_CODEBOOK if cell.bits == 4 else NF3_CODEBOOK)[codes.long()]
        decoded = ((codes - zero) * scale).reshape(weight.shape) * columns.reshape(1, -1)
        nbytes = weight.numel() * cell.bits / 8 + 2 * (scale.numel() + zero.numel() + columns.numel())
        return Rounded(decoded, nbytes)

    return round_one


def torchao_int4(hqq: bool) -> RoundOne:
    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        """What `Int4WeightOnlyConfig` computes for its tile-packed format: float zero point, both parts bfloat16."""
        from torchao.quantization import quant_primitives as primitives

        group = group_of(cell, weight.shape[1])
        block = (1, group)
        if hqq:
            codes, scale, zero, _ = primitives._choose_qparams_and_quantize_affine_hqq(
                weight, nbits=4, group_size=group, axis=1, compute_dtype=torch.bfloat16, device="cpu", raw_output=False
            )
            codes = codes.to(torch.int32)
        else:
            kind = primitives.MappingType.ASYMMETRIC
            scale, zero = primitives._choose_qparams_affine_tinygemm(
                weight, kind, block, torch.int32, 0, 15, 1e-6, torch.bfloat16, torch.bfloat16
            )
            codes = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, 15)
        scale, zero = scale.float(), zero.float()
        decoded = primitives._dequantize_affine_tinygemm(codes, block, scale, zero, torch.int32, 0, 15)
        return Rounded(decoded.reshape(weight.shape), (weight.numel() * 4 + scale.numel() * 32) / 8)

    return round_one


def torchao_intx(algorithm: str) -> RoundOne:
    def round_one(weight: Tensor, cell: Cell) -> Rounded:
        """`IntxWeightOnlyConfig`, symmetric; scales in bfloat16."""
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_api import (
            IntxChooseQParamsAlgorithm,
            IntxWeightOnlyConfig,
            _intx_weight_only_quantize_tensor,
        )

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{cell.bits}"),
            granularity=PerGroup(group_of(cell, weight.shape[1])),
            scale_dtype=torch.bfloat16,
            intx_choose_qparams_algorithm=getattr(IntxChooseQParamsAlgorithm, algorithm),
        )
        tensor = _intx_weight_only_quantize_tensor(weight, config)
        nbytes = (weight.numel() * cell.bits + tensor.scale.numel() * 16) / 8
        return Rounded(tensor.dequantize().float(), nbytes)

    return round_one


def method(name: str, package: str, call: str, round_one: RoundOne, cells: tuple[Cell, ...] = CELLS) -> Method:
    return Method(name, (package,), call, each_weight(round_one), cells)


METHODS = [
    method("HQQ", "hqq", "Quantizer.quantize, hqq_base_quant_config(axis=1), optimize=True", hqq),
    method(
        "bitsandbytes NF4",
        "bitsandbytes",
        "functional.quantize_4bit(compress_statistics=True, quant_type='nf4')",
        bitsandbytes,
        FOUR_BITS,
    ),
    method("SINQ", "sinq", "tiled_quant_rectangle(method='sinq')", sinq("sinq")),
    method("SINQ NF4", "sinq", "tiled_quant_rectangle(method='sinq_nf4')", sinq("sinq_nf4"), FOUR_BITS),
    method("torchao int4", "torchao", "Int4WeightOnlyConfig, tinygemm", torchao_int4(False), FOUR_BITS),
    method("torchao int4 hqq", "torchao", "Int4WeightOnlyConfig, hqq", torchao_int4(True), FOUR_BITS),
    method("torchao intx", "torchao", "IntxWeightOnlyConfig, AFFINE", torchao_intx("AFFINE"), THREE_BITS),
    method(
        "torchao intx hqq",
        "torchao",
        "IntxWeightOnlyConfig, HQQ_SCALE_ONLY",
        torchao_intx("HQQ_SCALE_ONLY"),
        THREE_BITS,
    ),
]
