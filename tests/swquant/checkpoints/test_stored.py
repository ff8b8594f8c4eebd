"""What is loaded is what was written: a hash of every part is held against the manifest whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuzz.worlds import seal_manifest, sealed
from safetensors.torch import load_file, save_file

import swquant
from swquant.checkpoints.compressed import CompressedCheckpoint

MANIFEST, SIDECAR = "swquant/manifest.json", "swquant/outliers.safetensors"
WEIGHTS, UP = "model-00001-of-00001.safetensors", "model.layers.2.mlp.up_proj"


def flip(path: Path, name: str) -> None:
    """One bit of a stored tensor."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    data[start + (begin + end) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", [f"{UP}.weight_packed", f"{UP}.weight_scale", "model.norm.weight"])
def test_one_flipped_bit_is_not_loaded(damaged: Path, part: str) -> None:
    flip(damaged / WEIGHTS, part)
    with pytest.raises(swquant.SwquantError, match=f"{part} is not what was written .*fetch or write it again"):
        swquant.load(damaged)


@pytest.mark.parametrize("part", ["cols", "values"])
def test_one_flipped_bit_of_the_sidecar_is_not_loaded(damaged: Path, part: str) -> None:
    flip(damaged / SIDECAR, f"outliers/{UP}.weight.{part}")
    with pytest.raises(swquant.SwquantError, match=f"{SIDECAR} is not what was written.*--no-restore"):
        swquant.load(damaged)
    assert swquant.load(damaged, restore=False)


def test_a_signed_manifest_whose_hash_of_a_tensor_is_not_true_is_reported(damaged: Path) -> None:
    manifest = json.loads((damaged / MANIFEST).read_text())
    manifest["tensors"][f"{UP}.weight"]["sha256"][f"{UP}.weight_scale"] = "0" * 64
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    seal_manifest(damaged / MANIFEST)
    (problem,) = swquant.verify(damaged)
    assert f"{UP}.weight_scale is not what was written" in problem


def test_scales_that_make_a_weight_infinite_are_reported_and_not_loaded(damaged: Path) -> None:
    tensors = load_file(damaged / WEIGHTS)
    tensors[f"{UP}.weight_scale"][3, 0] = torch.finfo(torch.bfloat16).max
    save_file(tensors, damaged / WEIGHTS, {"format": "pt"})
    sealed(damaged)
    (problem,) = swquant.verify(damaged)
    assert "so large that a weight is infinite" in problem
    with (
        CompressedCheckpoint(damaged) as checkpoint,
        pytest.raises(swquant.SwquantError, match="so large that a weight is infinite"),
    ):
        checkpoint.read(f"{UP}.weight")
