"""--bits-budget: never over the budget, one scheme for weights that loaders fuse, more bits where rounding is felt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.command_line import Cli
from support.tiny_models import PROMPT, planted_model, save_model, tiny_model

import swquant
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.budget import fused_groups, sensitivities
from swquant.compress.options import CompressOptions
from swquant.compress.plan import make_plan
from swquant.detect.pipeline import find_super_weights
from swquant.progress import silent

OPTIONS = {"block": "16", "prompt": PROMPT}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny llama whose first attention hardly matters."""
    made = tiny_model("llama")
    with torch.no_grad():
        made.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1e-4)
    return save_model(made, tmp_path / "model", torch.bfloat16)


@pytest.mark.parametrize("budget", [3.5, 5.25])
def test_the_budget_is_kept_and_used(model: Path, tmp_path: Path, budget: float) -> None:
    result = swquant.compress(model, tmp_path / "out", bits_budget=budget, **OPTIONS)
    stored = result.manifest["totals"]["bits_per_quantized_weight"]
    assert budget - 0.3 < stored <= budget
    assert not swquant.verify(result.path)
    assert swquant.load(result.path).eval() is not None


def test_weights_that_loaders_fuse_have_equal_bits_and_what_does_not_matter_has_fewest(
    model: Path, tmp_path: Path
) -> None:
    tensors = swquant.compress(model, tmp_path / "out", bits_budget=5.25, **OPTIONS).manifest["tensors"]
    bits = {name: record["bits"] for name, record in tensors.items() if "bits" in record}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({bits[f"{attention}.{part}_proj.weight"] for part in "qkv"}) == 1
        assert bits[f"{mlp}.gate_proj.weight"] == bits[f"{mlp}.up_proj.weight"]
    assert bits["model.layers.0.self_attn.o_proj.weight"] == min(bits.values()) < max(bits.values())


def test_stock_transformers_loads_several_numbers_of_bits(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = swquant.compress(model, tmp_path / "out", bits_budget=5.25, outliers=0.0, **OPTIONS).path
    ours, stock = swquant.load(out, restore=False), AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_rounding_is_felt_in_every_family(architecture: str, tmp_path: Path) -> None:
    folder = planted_model(architecture, tmp_path / "model").folder
    with open_checkpoint(folder) as checkpoint:
        found = find_super_weights(checkpoint, PROMPT)
        names = [name for name, weight in found.architecture.weights.items() if weight.kind in ("linear", "expert")]
        groups = fused_groups(found, names)
        assert sorted(name for group in groups for name in group) == sorted(names)
        experts = [group for group in groups if any(".experts." in name for name in group)]
        assert len(experts) <= 1
        options = CompressOptions(block="16")
        plan = make_plan(checkpoint, found.architecture, found.detection.super_weights, options)
        planned = {tensor.name: tensor for tensor in plan.quantized}
        tried = [[planned[name] for name in group] for group in groups]
        felt = sensitivities(checkpoint, found, options, tried, low_memory=False, progress=silent)
    assert all(loss > 0 for loss in felt)


def test_impossible_budgets_name_the_range(model: Path, tmp_path: Path) -> None:
    for budget in (1.5, 40.0):
        with pytest.raises(SwquantError, match=r"outside 3\.\d\d to 9\.\d\d, what 2 and 8 bits take with block 16"):
            swquant.compress(model, tmp_path / "out", bits_budget=budget, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_bits_and_a_budget_contradict_each_other() -> None:
    with pytest.raises(SwquantError, match="bits 3 and a budget of 4.25 bits per weight contradict"):
        CompressOptions(bits=3, bits_budget=4.25)


def test_the_plan_shows_the_schemes(model: Path, cli: Cli) -> None:
    ran = cli("compress", model, "--bits-budget", "5.25", "--block", "16", "--prompt", PROMPT, "--dry-run")
    assert ran.code == 0
    assert "model-w5.25-b16" in ran.out
    assert len({line.split("int")[1][0] for line in ran.out.splitlines() if " int" in line}) > 1
