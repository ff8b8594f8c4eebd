"""Codes with offsets: stock transformers reads what is written, an independent decoder agrees, and they are better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import every_architecture
from support.plain_decoder import decoded
from support.tiny_models import PROMPT, Planted
from transformers import AutoModelForCausalLM

import swquant
from exporters.json_file import read_json


@pytest.fixture(scope="module")
def written(bf16_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("offsets") / "out"
    swquant.compress(bf16_llama.folder, out, block="32", offsets="float", prompt=PROMPT)
    return out


def stock(folder: Path) -> tuple[Any, dict[str, Any]]:
    """As a user loads it: without a device, transformers takes Apple's for a checkpoint of this kind."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True)


def test_stock_transformers_an_independent_decoder_and_we_read_the_same(written: Path, bf16_llama: Planted) -> None:
    model, info = stock(written)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]
    plain = decoded(written)
    ours = dict(swquant.load(written, restore=False).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name])
        assert torch.equal(parameter, ours[name])
    config = read_json(written / "config.json")["quantization_config"]
    assert config == {"quant_method": "metal", "bits": 4, "group_size": 32, "modules_to_not_convert": ["lm_head"]}


def test_super_weights_are_exact_with_the_sidecar_and_nearly_without(written: Path, bf16_llama: Planted) -> None:
    place = (bf16_llama.row, bf16_llama.col)
    values = [
        dict(swquant.load(written, restore=on).named_parameters())[bf16_llama.name][place] for on in (True, False)
    ]
    assert float(values[0]) == 60.0
    assert float(values[1]) == pytest.approx(60.0, rel=0.01)


def test_the_error_is_smaller_than_with_a_symmetric_grid(written: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    swquant.compress(bf16_llama.folder, tmp_path / "plain", block="32", prompt=PROMPT)
    with_offsets, without = (
        read_json(folder / "swquant/manifest.json")["tensors"] for folder in (written, tmp_path / "plain")
    )
    errors = [
        (with_offsets[name]["relative_error"], record["relative_error"])
        for name, record in without.items()
        if "bits" in record
    ]
    assert sum(new for new, _ in errors) < 0.85 * sum(old for _, old in errors)


def test_what_is_written_says_what_it_is(written: Path) -> None:
    manifest = read_json(written / "swquant/manifest.json")
    assert manifest["options"]["offsets"] == "float"
    rounded = [record for record in manifest["tensors"].values() if "bits" in record]
    assert {record["stored_as"] for record in rounded} == {"int4 group 32 offset"}
    assert 'device_map="cpu"' in manifest["loaders"]["transformers"]
    assert manifest["loaders"]["vLLM"].startswith("no: ")
    assert swquant.verify(written, loads=True) == []


def test_a_mixture_is_read_too(tmp_path: Path) -> None:
    source = every_architecture.save(every_architecture.build("mixtral"), tmp_path / "source")
    swquant.compress(source, tmp_path / "out", block="32", offsets="float")
    model, info = stock(tmp_path / "out")
    assert not info["missing_keys"]
    ours = dict(swquant.load(tmp_path / "out", restore=False).named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in model.named_parameters())


def test_one_block_for_all(tmp_path: Path, bf16_llama: Planted) -> None:
    """Inputs of 64 and more: 128 does not divide them all, what they have in common does."""
    manifest = swquant.compress(
        bf16_llama.folder, tmp_path / "out", block="128", offsets="float", prompt=PROMPT
    ).manifest
    blocks = {record["block"] for record in manifest["tensors"].values() if "bits" in record}
    assert len(blocks) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "--offsets float with 3 bits: the layout that holds offsets takes 2, 4 or 8"),
        ({"symmetric": False}, "--offsets float and --asymmetric are two ways"),
        ({"clip": "z=9"}, "--offsets float and clip z=9 are two ways"),
        ({"bits_budget": 4.5}, "--offsets float does not go with --bits-budget"),
        ({"activations": "int8"}, "--offsets float does not go with --activations int8"),
        ({"block": "16"}, "block 16 holds no offsets: their layout takes 32, 64 or 128 inputs"),
        ({"block": "channel"}, "block channel holds no offsets"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str, bf16_llama: Planted, tmp_path: Path) -> None:
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.compress(bf16_llama.folder, tmp_path / "out", offsets="float", prompt=PROMPT, **options)
    assert not (tmp_path / "out").exists()
