"""The plan: which tensor gets which block or stays dense, and that the files are exactly as planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import PROMPT, Planted, planted_model, save_model, tiny_model

from calibrationless import Group, SuperWeight
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.choice import MAX_BLOCK_WITH_SUPER_WEIGHT
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import prepare, write
from swquant.compress.plan import Plan, TensorPlan, make_plan
from swquant.models.architecture import describe

DOWN = "model.layers.1.mlp.down_proj.weight"


def super_weight(name: str, row: int, col: int) -> SuperWeight:
    return SuperWeight(name, 1, row, col, 60.0, "creator", 0, 1.0, 1.0, 1.0, 1.0)


def plan_of(folder: Path, *found: SuperWeight, **options: Any) -> Plan:
    with open_checkpoint(folder) as checkpoint:
        return make_plan(checkpoint, describe(checkpoint), found, CompressOptions(**options))


def by_name(plan: Plan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of 96 and 1,024: blocks of 128 divide the second only."""
    model = tiny_model("llama", hidden_size=96, intermediate_size=1024, num_hidden_layers=2)
    return save_model(model, tmp_path_factory.mktemp("plan") / "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("mixtral", num_hidden_layers=2, intermediate_size=96)
    return save_model(model, tmp_path_factory.mktemp("plan") / "mixtral", torch.bfloat16)


def test_a_block_that_does_not_divide_falls_back_and_a_note_says_so(llama: Path) -> None:
    plan = plan_of(llama)
    blocks = {name: tensor.block for name, tensor in by_name(plan).items()}
    assert blocks[DOWN] == Group(128)
    assert blocks["model.layers.1.mlp.up_proj.weight"] == Group(32)
    assert plan.notes == ("block 128 does not divide 12 tensors, which take 32",)
    with pytest.raises(SwquantError, match=r"block 128 does not divide in_features 96 of .*; use 96 or channel"):
        plan_of(llama, strict_block=True)


def test_what_fits_no_block_stays_dense_with_the_reason(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=72, num_attention_heads=2, num_hidden_layers=1)  # 72 = 8 * 9
    folder = save_model(model, tmp_path / "odd")
    plan = plan_of(folder)
    reason = by_name(plan)["model.layers.0.mlp.up_proj.weight"].reason
    assert (
        reason
        == "block 128 does not divide in_features 72 of model.layers.0.mlp.up_proj.weight and no power of two from 16 does"
    )
    assert [tensor.name for tensor in plan.quantized] == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(SwquantError, match=r"odd: nothing would be compressed; \d+ tensors: --dense"):
        plan_of(folder, dense=("down_proj", "up_proj", "gate_proj", "self_attn"))


@pytest.mark.parametrize(
    ("block", "dense"),
    [("128", False), ("512", False), ("1024", True), ("channel", True), ("32x32", True), ("16x32", False)],
)
def test_the_safety_rule_counts_the_weights_of_a_block(llama: Path, block: str, dense: bool) -> None:
    tensors = by_name(plan_of(llama, super_weight(DOWN, 3, 700), block=block))
    assert (tensors[DOWN].block is None) == dense
    assert tensors[DOWN].super_weights == ((3, 700),)
    if dense:
        assert f"limit {MAX_BLOCK_WITH_SUPER_WEIGHT}" in tensors[DOWN].reason
    assert tensors["model.layers.0.mlp.down_proj.weight"].block is not None  # the rule is for the one that holds it


def test_dense_takes_a_part_of_a_name_or_a_glob(llama: Path) -> None:
    tensors = by_name(plan_of(llama, dense=("layers.0.", "*.up_proj.weight")))
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            assert (tensor.block is None) == ("layers.0." in name or "up_proj" in name), name
    assert tensors["model.layers.0.mlp.down_proj.weight"].reason == "--dense layers.0."
    assert tensors["model.layers.1.mlp.up_proj.weight"].reason == "--dense *.up_proj.weight"
    with pytest.raises(SwquantError, match=r"--dense '\*\.up_proj' matches no tensor"):
        plan_of(llama, dense=("*.up_proj",))


def test_a_flat_block_that_straddles_rows_is_refused_with_what_works(llama: Path) -> None:
    assert by_name(plan_of(llama, block="flat:32"))[DOWN].block is not None
    with pytest.raises(
        SwquantError, match=r"cannot store block flat:64 on model\.layers\.0\.\S+ \[\d+, 96\]; use 96 or channel, or a"
    ):
        plan_of(llama, block="flat:64")
    with pytest.raises(SwquantError, match=r"the ONNX operator cannot store block 2x16 on \S+ \[\d+, \d+\]; use \d+"):
        plan_of(llama, block="2x16", offsets="byte")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": False}, "one symmetric scheme; use --symmetric"),
        ({"dense": ("experts.1.",)}, r"--dense experts\.1\. matches .*give a narrower pattern"),
        ({"strict_block": True}, "block 128 does not divide .*; use 32 or channel"),
    ],
    ids=["asymmetric", "dense", "strict"],
)
def test_experts_are_all_alike_or_refused(mixtral: Path, options: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        plan_of(mixtral, **options)


def test_experts_share_a_block_that_suits_all(mixtral: Path) -> None:
    plan = plan_of(mixtral)  # 64 and 96 inputs
    experts = [tensor for tensor in plan.tensors if ".experts." in tensor.name]
    assert len(experts) == 2 * 4 * 3
    assert {tensor.block for tensor in experts} == {Group(32)}
    assert by_name(plan)["model.layers.0.self_attn.q_proj.weight"].block == Group(64)


def test_an_expert_with_a_super_weight_cannot_stay_dense_alone(mixtral: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    with pytest.raises(SwquantError, match=r"experts\.2\.w2\.weight holds a super weight.*--block 128"):
        plan_of(mixtral, super_weight(name, 1, 2), block="tensor")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outliers": 0.003, "bits": 3},
        {"symmetric": False, "dtype": "float32"},
        {"block": "tensor", "restore": False},
    ],
    ids=str,
)
def test_the_files_are_as_planned_to_the_byte(planted_llama: Planted, tmp_path: Path, options: dict) -> None:
    with open_checkpoint(planted_llama.folder) as checkpoint:
        prepared = prepare(checkpoint, CompressOptions(prompt=PROMPT, shard_size="1MB", **options))
        manifest = write(prepared, tmp_path / "out").manifest
    for tensor in prepared.plan.tensors:
        record = manifest["tensors"][tensor.name]
        assert record["bytes"] == tensor.nbytes
        assert record.get("outliers", 0) == tensor.outliers
    weights = list((tmp_path / "out").rglob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in weights)
    assert sum(path.stat().st_size for path in weights) - headers == prepared.plan.nbytes


def test_bits_per_weight_counts_scales_zero_points_and_outliers(llama: Path) -> None:
    assert plan_of(llama, block="32").bits_per_weight == pytest.approx(4 + 16 / 32, abs=0.05)
    assert plan_of(llama, block="32", symmetric=False).bits_per_weight == pytest.approx(4 + 20 / 32, abs=0.05)
    with_outliers = plan_of(llama, block="32", outliers=0.01).bits_per_weight
    assert with_outliers == pytest.approx(4 + 16 / 32 + 0.01 * (32 + 32 + 16), abs=0.06)


def test_conv1d_is_detected_but_not_compressed(tmp_path: Path) -> None:
    folder = planted_model("gpt2", tmp_path / "gpt2").folder
    with pytest.raises(SwquantError, match="nothing would be compressed; 24 tensors: Conv1D, which compressed-tensors"):
        plan_of(folder)
