"""Stock transformers reads every number of bits, block and grid as they are stored, or nothing is written.

compressed-tensors 0.18 to 0.20 makes no room for packed zero points in a module, whatever the bits and the block: a
checkpoint with them is decoded while loading. An independent decoder says what the weights are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, one_line
from support.plain_decoder import decoded
from support.signed import sign
from support.tiny_models import PROMPT, read_config, save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.config import checkpoint_config
from swquant.compress.loaders import loader_table
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import prepare
from swquant.models.rehearsal import rehearse

# name -> (architecture, changes); rows and columns of the second and third fill no whole words, but at 8 bits.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 200": ("llama", {"intermediate_size": 200}),
    "gemma3 12": ("gemma3", {"head_dim": 12}),
    "gpt2": ("gpt2", {"n_layer": 1}),
}
BLOCKS = ("channel", "32", "8x32", "tensor")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder, one layer each."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_model(tiny_model(kind, **{"num_hidden_layers": 1, **changes}), root / name, torch.bfloat16)
        for name, (kind, changes) in MODELS.items()
    }


def check(source: Path, out: Path, **options: Any) -> swquant.Manifest:
    """Compress, and compare what stock transformers, the independent decoder and we read, to the bit."""
    manifest = swquant.compress(source, out, prompt=PROMPT, preset="fast", allow_dense=True, **options).manifest
    stock, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, device_map="cpu")
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    with torch.no_grad():
        stock(torch.tensor([[5, 9, 17]]))  # compressed-tensors decodes what lies in modules only now
    plain, read = decoded(out), dict(stock.named_parameters())
    for name, parameter in swquant.load(out, restore=False).named_parameters():
        assert torch.equal(read[name], plain[name]), name
        assert torch.equal(parameter, plain[name]), name
    assert swquant.verify(out, loads=True) == []
    return manifest


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"bits": 4, "block": "32"}),
        ("llama 200", {"bits": 3, "block": "channel"}),
        ("gemma3 12", {"bits": 5, "block": "channel"}),
        ("gemma3 12", {"bits": 8, "block": "32"}),  # does not divide the 48 inputs of o_proj
        ("gpt2", {"bits": 7, "block": "tensor"}),
    ],
    ids=str,
)
def test_zero_points_are_loaded(model: str, options: dict, models: dict[str, Path], tmp_path: Path) -> None:
    manifest = check(models[model], tmp_path / "out", symmetric=False, **options)
    config = read_config(tmp_path / "out")["quantization_config"]
    assert (config["dequantize"], len(config["config_groups"])) == (True, 1)
    assert manifest["loaders"]["transformers"].startswith("yes, from 5.23 on, which decodes it while loading")
    assert manifest["loaders"]["vLLM"].startswith("no: in GPT-2") == (model == "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama"])
def test_every_grid_and_block_is_loaded(model: str, bits: int, models: dict[str, Path], tmp_path: Path) -> None:
    for block in BLOCKS:
        for symmetric in (True, False):
            check(models[model], tmp_path / f"{block}-{symmetric}", bits=bits, block=block, symmetric=symmetric)


def test_the_rehearsal_sees_that_modules_have_no_room(models: dict[str, Path]) -> None:
    """And of a weight that is decoded without memory only what its words say: 19 of 3 bits hold 200 codes, or 202."""
    options = CompressOptions(prompt=PROMPT, preset="fast", block="channel", bits=3, symmetric=False)
    with open_checkpoint(models["llama 200"]) as checkpoint:
        prepared = prepare(checkpoint, options)
        config = checkpoint_config(checkpoint, prepared.plan, prepared.found.architecture)
        layout = {name: form for tensor in prepared.plan.tensors for name, form in tensor.layout.items()}
        assert rehearse(checkpoint, config, layout).problem == ""
        name = "model.layers.0.mlp.down_proj.weight"
        other = {**layout, f"{name}_packed": (torch.int32, (64, 20))}
        assert rehearse(checkpoint, config, other).mismatched == (name,)
        del config["quantization_config"]["dequantize"]
        seen = rehearse(checkpoint, config, layout)
    assert len(seen.zero_points) == 7
    assert seen.problem == "model.layers.0.mlp.down_proj.weight_zero_point would have another shape"


def test_what_says_nothing_of_decoding_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """A folder of an earlier version: verify --loads tells, as stock transformers does."""
    out = swquant.compress(models["llama"], tmp_path / "out", prompt=PROMPT, preset="fast", symmetric=False).path
    config = read_config(out)
    del config["quantization_config"]["dequantize"]
    (out / "config.json").write_text(json.dumps(config))
    sign(out)
    assert swquant.verify(out) == []
    (problem,) = swquant.verify(out, loads=True)
    assert "weight_zero_point would have another shape" in problem
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(out)


def test_blocks_that_share_no_scheme_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """64 weights are a row of 64 inputs, and half of one of 128."""
    words = "not int4 group 64 asymmetric and int4 channel asymmetric; use --block 32 or channel, or --symmetric"
    with pytest.raises(swquant.SwquantError, match=words):
        swquant.compress(models["llama"], tmp_path / "out", prompt=PROMPT, symmetric=False, block="flat:64")
    assert not (tmp_path / "out").exists()


def test_different_bits_are_refused_before_the_work(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    for given in (("--bits-budget", "4.5"), ("--bits-for", "down_proj=8")):
        ran = cli("compress", models["llama"], tmp_path / "out", "--asymmetric", *given)
        assert f"{given[0]} does not go with --asymmetric: " in one_line(ran)
        assert one_line(ran).endswith("; use --symmetric")
        assert not (tmp_path / "out").exists()


def test_what_goes_into_another_format_may_have_different_bits_and_blocks(models: dict[str, Path]) -> None:
    """The checkpoint on the way to it is nothing that stock transformers has to load."""
    options = {"prompt": PROMPT, "preset": "fast", "symmetric": False, "bits_for": ("down_proj=8",)}
    plan = swquant.plan(models["llama"], format="onnx", **options).prepared.plan
    assert {(tensor.bits, str(tensor.block)) for tensor in plan.quantized} == {(4, "64"), (8, "128")}
    assert not plan.decoded
    assert loader_table(plan)["transformers"].startswith("only with a compressed-tensors that makes room")
