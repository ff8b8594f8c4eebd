"""The plain block types of GGUF, decoded by torch in pieces that fit the cache: what the gguf package gives to the bit,
in half of its time. Of a small model that is a good part of the start. The package decodes the other types.

    Q4_0    18 bytes    float16 scale, 32 codes of 4 bits: the first 16 low, the others high     scale * (code - 8)
    Q4_1    20          float16 scale and offset, codes as above                                 scale * code + offset
    Q8_0    34          float16 scale, 32 signed bytes                                           scale * code
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibrationless import for_pieces

__all__ = ["PLAIN", "decode_plain"]

_BLOCK = 32  # weights


def _halves(blocks: Tensor, index: int) -> Tensor:
    """float32 [blocks, 1]: the float16 that stands `index` places from a block's beginning."""
    return blocks[:, 2 * index : 2 * index + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor, out: Tensor) -> Tensor:
    """Codes of uint8 [blocks, 16], as float32 [blocks, 32]. Put together as bytes: parts of rows cast slowly."""
    packed = packed.contiguous()
    return out.copy_(torch.cat([packed & 15, packed >> 4], dim=1))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out).sub_(8).mul_(_halves(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out).mul_(_halves(blocks, 0)).add_(_halves(blocks, 1))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_halves(blocks, 0))


# Name of the type -> bytes of a block, and what decodes uint8 [blocks, bytes] into float32 [blocks, 32].
PLAIN: dict[str, tuple[int, Callable[[Tensor, Tensor], None]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}


def decode_plain(data: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """float32 [rows, weights] of uint8 [rows, bytes] in one of the types of `PLAIN`. `data` may be a map of a file."""
    width, decode = PLAIN[kind]
    blocks = data.reshape(-1, width)
    weights = torch.empty(len(blocks), _BLOCK)

    def work(piece: slice) -> None:
        decode(torch.from_numpy(blocks[piece].copy()), weights[piece])  # torch wants what can be written

    for_pieces(work, *weights.shape)
    return weights.view(len(data), -1).numpy()
