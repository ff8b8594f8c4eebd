"""Folders that look like a model and are not one that can be compressed: what they are, and what to do instead.

A model that is quantized already says so in several ways: `quantization_config`, the files of GPTQ and AWQ tools of
old, or nothing but the names of its tensors. And some say so and are not: dequantized, with the entry left over. An
adapter beside a model is a change of it that would be lost. Each gets a message of its own, because each has another
remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from exporters.errors import SwquantError
from exporters.json_file import read_json
from swquant.checkpoints.base import Stored

__all__ = ["refuse_adapters", "refuse_no_config", "refuse_quantized", "refuse_quantized_mlx"]

_ADAPTER = "adapter_config.json"
_ORIGINAL = "start from the original model"
# Ends of names that only quantized weights have -> what makes them.
_MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".W_q": "HQQ",
    "_proj_blocks": "MXFP4",
}
# Files of tools from before quantization_config -> what wrote them.
_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
_SCALES = ("_scale_inv", "_scale")
_PARAMETERS = (".weight", ".bias")  # of modules, which are floats; buffers have other names
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_no_config(folder: Path, name: str) -> None:
    """Raise SwquantError where a folder has no config.json: it is an adapter alone, GGUF files, or no model at all."""
    if (folder / "config.json").is_file():
        return
    if (folder / _ADAPTER).is_file():
        base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
        raise SwquantError(
            f"{name}: only an adapter, of the model {str(base)[:200]!r}; {_merge('that model')} and give the folder you save"
        )
    if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        raise SwquantError(f"{name}: a folder of GGUF files; give one of them, as {folder / ggufs[0]}")
    raise SwquantError(f"{name}: no config.json; give a folder saved by save_pretrained(), or a .gguf file")


def refuse_adapters(folder: Path, name: str) -> None:
    """Raise SwquantError where an adapter lies beside the weights: some loaders lay it over them, others do not."""
    beside = [
        file for file in (_ADAPTER, "adapter_model.safetensors", "adapter_model.bin") if (folder / file).is_file()
    ]
    if beside:
        raise SwquantError(
            f"{name}: an adapter ({beside[0]}) lies beside the model, which would be compressed without it; "
            f"{_merge('the model')}, or move it out of the folder to leave it out"
        )


def _merge(what: str) -> str:
    return f"merge it into {what} with peft (merge_and_unload(), save_pretrained())"


def refuse_quantized_mlx(raw: Mapping[str, Any], name: str) -> None:
    """Raise SwquantError for a model that MLX quantized: its dtypes are not even safetensors' common ones."""
    entry = raw.get("quantization")
    if isinstance(entry, dict) and "bits" in entry:
        raise SwquantError(f"{name}: already quantized (MLX, {entry['bits']} bits); {_ORIGINAL}")


def refuse_quantized(folder: Path, name: str, raw: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Raise SwquantError for weights that stand for others, whatever says so, and for a claim that is not true."""
    mark = _mark(tensors)
    scaled = [weight for weight in tensors if _is_scaled_fp8(weight, tensors)]
    for key in ("quantization_config", "compression_config"):
        if entry := raw.get(key):
            method = str(entry.get("quant_method", "unknown"))[:40] if isinstance(entry, dict) else "unknown"
            if mark is None and not scaled and _only_floats(tensors):
                raise SwquantError(
                    f"{name}: config.json has a {key} ({method}), but the weights are plain floats, not quantized; "
                    f"if they were dequantized, delete the entry {key} from config.json"
                )
            raise SwquantError(f"{name}: already quantized ({method}); {_ORIGINAL}")
    if mark is not None:
        tensor, method = mark
        file = next((file for file in _FILES if (folder / file).is_file()), None)
        method = f"{_FILES[file]}, by {file}" if file is not None else f"{method}, by the name of {tensor}"
        raise SwquantError(f"{name}: already quantized ({method}); {_ORIGINAL}")
    if scaled:
        raise SwquantError(
            f"{name}: {len(scaled)} weights are FP8 with a scale beside them (first {scaled[0]}), but config.json has no "
            f"quantization_config, so no loader multiplies the two; fetch config.json again and dequantize, or {_ORIGINAL}"
        )
    whole = (weight for weight, stored in tensors.items() if weight.endswith(_PARAMETERS) and _is_whole(stored.dtype))
    if (weight := next(whole, None)) is not None:
        raise SwquantError(
            f"{name}: {weight} is of whole numbers ({tensors[weight].dtype}), and nothing says what they stand for; {_ORIGINAL}"
        )


def _mark(tensors: Mapping[str, Stored]) -> tuple[str, str] | None:
    """The first tensor whose name only quantized models have, and what makes such names."""
    return next(
        ((tensor, method) for tensor in tensors for end, method in _MARKS.items() if tensor.endswith(end)), None
    )


def _is_scaled_fp8(name: str, tensors: Mapping[str, Stored]) -> bool:
    return tensors[name].dtype in _FP8 and any(name + end in tensors for end in _SCALES)


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _only_floats(tensors: Mapping[str, Stored]) -> bool:
    """Whether every matrix of weights is of floats, and none has a scale."""
    return all(
        stored.dtype in _FLOATS and not name.endswith(_SCALES)
        for name, stored in tensors.items()
        if name.endswith(("weight", *_SCALES))
    )
