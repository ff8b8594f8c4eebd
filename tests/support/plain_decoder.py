"""What compressed-tensors' files mean, decoded again with NumPy and nothing of ours: the judge of what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def _codes(packed: torch.Tensor, bits: int, count: int, axis: int = 1) -> np.ndarray:
    """uint8 codes of int32 words: code i in bits [i * bits, (i + 1) * bits) of a row, lowest first."""
    words = packed.numpy().view(np.uint32) if axis == 1 else np.ascontiguousarray(packed.numpy().T).view(np.uint32)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.uint16)
    codes = (stream.reshape(len(words), count, bits) * weights).sum(2).astype(np.uint8)
    return codes if axis == 1 else codes.T


def _bits(config: dict[str, Any], scale: torch.Tensor, packed: torch.Tensor, inputs: int) -> int:
    """Of one module: the only width among the groups for which so many codes fit the words."""
    widths = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
    return next(bits for bits in sorted(widths) if -(-inputs * bits // 32) == packed.shape[1])


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Stored name of the original -> dense tensor, for every tensor of a checkpoint."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "metal":
        return _with_offsets(stored, config["bits"])
    dense = {name: value for name, value in stored.items() if name.rpartition(".")[2] not in _PARTS}
    for name in (name for name in stored if name.endswith(".weight_scale")):
        module, scale = name.removesuffix(".weight_scale"), stored[name]
        if f"{module}.weight" in stored:  # int-quantized
            dense[f"{module}.weight"] = (stored[f"{module}.weight"].float() * scale.float()).to(scale.dtype)
            continue
        packed, (rows, cols) = stored[f"{module}.weight_packed"], stored[f"{module}.weight_shape"].tolist()
        bits = _bits(config, scale, packed, cols)
        codes = torch.from_numpy(_codes(packed, bits, cols).astype(np.float32))
        zeros = torch.full(scale.shape, float(1 << (bits - 1)))
        if f"{module}.weight_zero_point" in stored:
            points = _codes(stored[f"{module}.weight_zero_point"], bits, rows, axis=0)
            zeros = torch.from_numpy(points.astype(np.float32).copy())
        group = cols // scale.shape[1]
        wide = scale.float().repeat_interleave(group, 1)
        dense[f"{module}.weight"] = ((codes - zeros.repeat_interleave(group, 1)) * wide).to(scale.dtype)
    return dense


def _with_offsets(stored: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """MLX's affine layout: `scales * code + qbiases` in float32, rounded to the type of the scales."""
    dense = {name: value for name, value in stored.items() if not name.endswith((".scales", ".qbiases"))}
    for name in (name for name in stored if name.endswith(".scales")):
        module, scale = name.removesuffix(".scales"), stored[name]
        words = stored[f"{module}.weight"].view(torch.int32)
        count = words.shape[1] * 32 // bits
        codes = torch.from_numpy(_codes(words, bits, count).astype(np.float32))
        wide = [
            part.float().repeat_interleave(count // scale.shape[1], 1) for part in (scale, stored[f"{module}.qbiases"])
        ]
        dense[f"{module}.weight"] = (codes * wide[0] + wide[1]).to(scale.dtype)
    return dense
