"""Folders as people have them: leftovers of earlier saves, adapters, weights that are quantized without saying so."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import PROMPT, read_config, save_model, tiny_model

import swquant
from swquant.checkpoints.open import open_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LINEAR = "model.layers.2.mlp.up_proj.weight"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **changes}))


def split(folder: Path) -> dict[str, str]:
    """Turn the one file into two with an index. Returns the index's table."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    table = {name: f"model-0000{1 + position % 2}-of-00002.safetensors" for position, name in enumerate(weights)}
    for shard in set(table.values()):
        save_file({name: weights[name] for name in weights if table[name] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return table


@pytest.mark.parametrize("low_memory", [False, True], ids=["in memory", "low memory"])
def test_an_index_beside_a_single_file_is_refused_and_both_are_named(
    source: Path, tmp_path: Path, low_memory: bool
) -> None:
    older = save_model(tiny_model("llama", seed=1), tmp_path / "older", max_shard_size="100KB")
    for path in older.glob("model*"):
        shutil.copy(path, source)
    message = rf"two sets of weights, {SINGLE} and the \d+ shards that {INDEX} names.*delete .*whichever is older"
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.detect(source, PROMPT, low_memory=low_memory)


def test_an_index_that_names_the_single_file_is_no_second_set(source: Path) -> None:
    table = dict.fromkeys(load_file(source / SINGLE), SINGLE)
    (source / INDEX).write_text(json.dumps({"weight_map": table}))
    assert len(swquant.detect(source, PROMPT).detection.super_weights) == 1


@pytest.mark.parametrize("low_memory", [False, True], ids=["in memory", "low memory"])
def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(source: Path, low_memory: bool) -> None:
    expected = swquant.detect(source, PROMPT).probe.logits
    table = split(source)
    for name in (LINEAR, "model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        other = source / next(shard for shard in set(table.values()) if shard != table[name])
        weights = load_file(other)
        save_file({**weights, name: torch.zeros_like(load_file(source / table[name])[name])}, other, {"format": "pt"})
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.read(LINEAR).any()
    torch.testing.assert_close(swquant.detect(source, PROMPT, low_memory=low_memory).probe.logits, expected)


def test_a_tensor_in_two_shards_that_the_index_leaves_out_is_refused(source: Path) -> None:
    table = split(source)
    for shard in set(table.values()):
        save_file({**load_file(source / shard), "extra": torch.zeros(2)}, source / shard, {"format": "pt"})
    with pytest.raises(swquant.SwquantError, match=r"extra is in model-.* and in model-.* names neither; fetch"):
        swquant.detect(source, PROMPT)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 4}


@pytest.mark.parametrize("low_memory", [False, True], ids=["in memory", "low memory"])
def test_an_adapter_beside_a_model_is_named(source: Path, low_memory: bool) -> None:
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(
        swquant.SwquantError, match=r"an adapter \(adapter_config\.json\).*merge_and_unload.*or move it"
    ):
        swquant.detect(source, PROMPT, low_memory=low_memory)


def test_an_adapter_alone_says_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(
        swquant.SwquantError, match="only an adapter, of the model 'owner/base'; merge it into that model"
    ):
        swquant.load(tmp_path)


def gptq(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "_proj." in name]:
        rows, cols = weights.pop(name).shape
        module = name.removesuffix(".weight")
        weights[f"{module}.qweight"] = torch.zeros(cols // 8, rows, dtype=torch.int32)
        weights[f"{module}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        weights[f"{module}.scales"] = torch.ones(1, rows)


def fp8(end: str, *, how_many: int | None = None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if "_proj." in name][:how_many]:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
            weights[name + end] = torch.ones(1, 1)

    return change


def bytes_of_four_bits(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "_proj." in name]:
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)


def nothing(weights: dict[str, torch.Tensor]) -> None:
    pass


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SCALED = r"weights are FP8 with a scale beside them \(first .*no quantization_config.*or start from the original"
LEFT_OVER = r"has a {} \({}\), but the weights are plain floats.*delete the entry {} from config\.json"
# What the tensors are, what config.json says, which files lie beside it, and the message.
QUANTIZED = {
    "GPTQ of old": (gptq, {}, ["quantize_config.json"], r"already quantized \(GPTQ, by quantize_config\.json\)"),
    "AWQ of old": (gptq, {}, ["quant_config.json"], r"already quantized \(AWQ, by quant_config\.json\); start from"),
    "GPTQ without a word": (gptq, {}, [], r"already quantized \(GPTQ or AWQ, by the name of .*qweight\); start from"),
    "FP8": (fp8("_scale_inv"), {"quantization_config": FP8}, [], r"already quantized \(fp8\); start from the original"),
    "FP8 without a word": (fp8("_scale_inv"), {}, [], "42 " + SCALED),
    "FP8 of another name": (fp8("_scale"), {}, [], "42 " + SCALED),
    "FP8 here and there": (fp8("_scale_inv", how_many=3), {}, [], "3 " + SCALED),
    "4 bits in bytes": (
        bytes_of_four_bits, {"quantization_config": {"quant_method": "bitsandbytes"}}, [],
        r"already quantized \(bitsandbytes\); start from the original model",
    ),
    "MLX": (nothing, {"quantization": {"group_size": 64, "bits": 4}}, [], r"already quantized \(MLX, 4 bits\); start"),
    "a left-over entry": (
        nothing, {"quantization_config": FP8}, [], LEFT_OVER.format("quantization_config", "fp8", "quantization_config"),
    ),
    "a left-over entry of old": (
        nothing, {"compression_config": {"quant_method": "compressed-tensors"}}, [],
        LEFT_OVER.format("compression_config", "compressed-tensors", "compression_config"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZED)
def test_weights_that_stand_for_others_are_told_from_those_that_do_not(source: Path, kind: str) -> None:
    change, config, files, message = QUANTIZED[kind]
    edit_weights(source, change)
    edit_config(source, **config)
    for file in files:
        (source / file).write_text("{}")
    with pytest.raises(swquant.SwquantError, match=message) as caught:
        swquant.detect(source, PROMPT)
    assert "\n" not in str(caught.value)


def test_fp8_that_is_only_a_cast_needs_no_scale(source: Path) -> None:
    edit_weights(source, lambda weights: weights.update({LINEAR: weights[LINEAR].to(torch.float8_e4m3fn)}))
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors[LINEAR].dtype is torch.float8_e4m3fn


def test_infinity_in_a_configuration_passes_through(source: Path, tmp_path: Path) -> None:
    edit_config(source, time_step_limit=[0.0, math.inf])
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT).path
    assert read_config(out)["time_step_limit"] == [0.0, math.inf]
    assert swquant.verify(out) == []
    assert swquant.load(out).config.time_step_limit == [0.0, math.inf]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_what_no_loader_looks_at_may_hold_anything(source: Path, tmp_path: Path, dtype: str) -> None:
    unused = {
        "model.layers.0.self_attn.masked_bias": torch.tensor(-math.inf, dtype=torch.bfloat16),
        "model.layers.9.mlp.up_proj.weight": torch.full((4, 4), math.nan, dtype=torch.bfloat16),
    }
    edit_weights(source, lambda weights: weights.update(unused))
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, dtype=dtype).path
    written = load_file(out / "model-00001-of-00001.safetensors")
    for name, tensor in unused.items():
        assert torch.equal(written[name].float(), tensor.float()) or written[name].isnan().all()
    assert swquant.verify(out) == []
    swquant.load(out)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_is_replaced_and_not_handed_on(
    source: Path, tmp_path: Path, key: str
) -> None:
    expected = swquant.detect(source, PROMPT).probe.logits
    edit_config(source, **{key: "flash_attention_2"})
    assert torch.equal(swquant.detect(source, PROMPT).probe.logits, expected)
    assert torch.equal(swquant.detect(source, PROMPT, low_memory=True).probe.logits, expected)
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert key not in read_config(result.path)
    assert any("flash_attention_2" in note for note in result.manifest["notes"])


def test_the_attention_that_transformers_has_is_handed_on(source: Path, tmp_path: Path) -> None:
    edit_config(source, attn_implementation="eager")
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert read_config(result.path)["attn_implementation"] == "eager"
    assert not any("attention" in note for note in result.manifest["notes"])


def test_a_padding_id_beyond_the_embedding_is_one_message(source: Path) -> None:
    edit_config(source, pad_token_id=128)
    with pytest.raises(swquant.SwquantError, match="pad_token_id 128, the embedding has rows 0 to 127; set it to null"):
        swquant.detect(source, PROMPT)
