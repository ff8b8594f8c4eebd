"""Scaled norms and weights: the same function in every family, and no scaling where something else reads the norm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import PROMPT, Planted, planted_model, save_model, tiny_model

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.folds import fold_columns, fold_gain
from swquant.detect.found import Found
from swquant.detect.pipeline import find_super_weights
from swquant.models.loading import build_model

# Norms of one layer that can be scaled; a mixture's second norm is read by its router, too.
FOLDABLE = {"llama": 2, "mistral": 2, "qwen3": 2, "phi3": 2, "gemma3": 2, "mixtral": 1, "qwen3_moe": 1, "opt": 2}


def folded(folder: Path) -> tuple[Found, torch.Tensor, torch.Tensor]:
    """(what was found, logits of the model, logits with every fold carried out)."""
    with open_checkpoint(folder) as checkpoint:
        found = find_super_weights(checkpoint, PROMPT, folds=True)
        model = build_model(checkpoint, torch.float32)
        tokens = torch.tensor([found.token_ids])
        with torch.no_grad():
            before = model(tokens).logits
            parameters = {
                checkpoint_name: model.get_parameter(checkpoint_name)
                for checkpoint_name in checkpoint.tensors
                if checkpoint_name in dict(model.named_parameters())
            }
            for fold in found.folds:
                parameters[fold.gain].copy_(fold_gain(parameters[fold.gain], fold))
                if fold.bias:
                    parameters[fold.bias].copy_(fold_gain(parameters[fold.bias], fold, is_bias=True))
                for name in fold.readers:
                    parameters[name].copy_(fold_columns(parameters[name], fold))
            return found, before, model(tokens).logits


@pytest.mark.parametrize("architecture", FOLDABLE)
def test_folding_changes_nothing(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:  # gains as trained models have them, not all one
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    found, before, after = folded(save_model(model, tmp_path / "model"))
    assert len(found.folds) == FOLDABLE[architecture] * len(found.architecture.layers)
    assert any(bool(fold.exponents.any()) for fold in found.folds)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.max() - before.min())


def test_gemma_adds_one_to_its_gain(tmp_path: Path) -> None:
    for architecture, offset in (("gemma3", 1.0), ("llama", 0.0)):
        found, _, _ = folded(save_model(tiny_model(architecture), tmp_path / architecture))
        assert {fold.offset for fold in found.folds} == {offset}


def test_a_scaled_checkpoint_stores_scaled_gains_and_says_so(planted_llama: Planted, tmp_path: Path) -> None:
    manifest = swquant.compress(planted_llama.folder, tmp_path / "out", prompt=PROMPT, block="32").manifest
    before = load_file(planted_llama.folder / "model.safetensors")
    after = {k: v for path in sorted((tmp_path / "out").glob("*.safetensors")) for k, v in load_file(path).items()}
    scaled = {name for name, record in manifest["tensors"].items() if record.get("scaled")}
    assert "model.layers.0.input_layernorm.weight" in scaled
    assert "model.layers.0.mlp.up_proj.weight" in scaled
    assert "model.layers.0.mlp.down_proj.weight" not in scaled
    ratios = [torch.log2(after[name] / before[name]) for name in scaled if "layernorm" in name]
    assert all(torch.equal(ratio, ratio.round()) for ratio in ratios)
    assert any(bool(ratio.any()) for ratio in ratios)


@pytest.mark.parametrize("options", [{"refine": "none"}, {"dense": ("q_proj", "gate_proj")}], ids=str)
def test_nothing_is_scaled_where_it_does_not_pay_or_a_reader_stays_dense(
    planted_llama: Planted, tmp_path: Path, options: dict
) -> None:
    manifest = swquant.compress(planted_llama.folder, tmp_path / "out", prompt=PROMPT, **options).manifest
    assert not any(record.get("scaled") for record in manifest["tensors"].values())


def test_refining_loses_less_of_what_the_layers_put_out(tmp_path: Path) -> None:
    planted = planted_model("llama", tmp_path / "model")
    errors = {}
    for preset in ("fast", "balanced"):
        manifest = swquant.compress(planted.folder, tmp_path / preset, prompt=PROMPT, preset=preset, bits=3).manifest
        errors[preset] = sum(record.get("output_error", 0.0) ** 2 for record in manifest["tensors"].values())
    assert errors["balanced"] < 0.8 * errors["fast"]
