"""Models that train blocks, and the checkpoints that hold them: what was trained is what every reader gets."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.patched import planned, record
from support.tiny_models import PROMPT, TOKENS, Planted, planted_model, sample_text, save_model, tiny_model

import swquant
from exporters.errors import SwquantError
from exporters.sidecar import SIDECAR
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import read_manifest
from swquant.checkpoints.open import open_checkpoint
from swquant.models.architecture import describe
from swquant.training.model import lay, linear_names, trainable_model
from swquant.training.patched import free_name, write_patched


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a super weight, compressed: where one is planted, it drowns whatever blocks do."""
    folder = tmp_path_factory.mktemp("plain")
    save_model(tiny_model("llama"), folder / "model", torch.bfloat16)
    return swquant.compress(folder / "model", folder / "out", prompt=PROMPT, outliers=0.01).path


@pytest.mark.parametrize("packed", [True, False])
def test_the_model_that_trains_is_the_model_that_loads(plain: Path, tmp_path: Path, packed: bool) -> None:
    with CompressedCheckpoint(plain) as checkpoint:
        model = trainable_model(checkpoint)
        weights = linear_names(describe(checkpoint), model)
        assert len(weights) == 6 * 7
        before = model(TOKENS).logits
        blocks = planned(checkpoint, weights)
        layers = lay(model, checkpoint, weights, blocks, packed=packed)
        training = model(TOKENS).logits
        stored = {name: layer.trained(torch.bfloat16) for name, layer in layers.items()}
        write_patched(checkpoint, tmp_path / "out", "tuned", stored, record(stored))
    loaded = swquant.load(tmp_path / "out", dtype=torch.float32)(TOKENS).logits
    assert float((training - before).abs().max()) > 0.1
    # Loading rounds the sum to bfloat16.
    assert float((training - loaded).abs().max()) < 0.05 * float((training - before).abs().max())
    assert torch.equal(swquant.load(tmp_path / "out", dtype=torch.float32, restore=False)(TOKENS).logits,
                       swquant.load(plain, dtype=torch.float32, restore=False)(TOKENS).logits)  # fmt: skip
    assert swquant.verify(tmp_path / "out", loads=True) == []


def test_everything_but_sidecar_manifest_and_card_is_the_input(compressed: Path, tmp_path: Path) -> None:
    with CompressedCheckpoint(compressed) as checkpoint:
        blocks = planned(checkpoint, [checkpoint.quantized_names[0]])
        manifest = write_patched(checkpoint, tmp_path / "out", "tuned", blocks, record(blocks))
    old = read_manifest(compressed)
    changed = {
        name for name in {**old["files"], **manifest["files"]} if old["files"].get(name) != manifest["files"].get(name)
    }
    assert changed == {SIDECAR, "README.md"}
    more = manifest["totals"]["bits_per_quantized_weight"] - old["totals"]["bits_per_quantized_weight"]
    assert more == pytest.approx(8 * record(blocks)["bytes"] / old["totals"]["quantized_weights"], abs=1e-4)
    assert manifest["totals"]["bytes"] - old["totals"]["bytes"] >= record(blocks)["bytes"]
    assert swquant.inspect(tmp_path / "out")["tuned"]["tuned"]["blocks"] == 2


def test_a_second_set_lies_over_the_first(compressed: Path, tmp_path: Path) -> None:
    with CompressedCheckpoint(compressed) as checkpoint:
        name = checkpoint.quantized_names[0]
        blocks = planned(checkpoint, [name])
        write_patched(checkpoint, tmp_path / "one", "tuned", blocks, record(blocks))
        base = checkpoint.read(name).float()
    with CompressedCheckpoint(tmp_path / "one") as checkpoint:
        assert free_name(checkpoint.manifest) == "tuned-2"
        write_patched(checkpoint, tmp_path / "two", "tuned-2", blocks, record(blocks))
    with CompressedCheckpoint(tmp_path / "two") as checkpoint:
        assert [type(patch).__name__ for patch in checkpoint.patches(name)] == ["Points", "Blocks", "Blocks"]
        moved = checkpoint.read(name).float() - base
    assert torch.allclose(moved[:16, :16], 2 * blocks[name].values[0].float(), atol=0.02)
    assert float(moved[16:32, :16].abs().max()) == 0.0


def test_dense_tensors_can_have_blocks_too(bf16_llama: Planted, tmp_path: Path) -> None:
    swquant.compress(bf16_llama.folder, tmp_path / "c", prompt=PROMPT, dense=("v_proj",))
    with CompressedCheckpoint(tmp_path / "c") as checkpoint:
        name = next(name for name in checkpoint.tensors if "v_proj" in name)
        blocks = planned(checkpoint, [name])
        base = checkpoint.read(name).float()
        write_patched(checkpoint, tmp_path / "out", "tuned", blocks, record(blocks))
    with CompressedCheckpoint(tmp_path / "out") as checkpoint:
        assert torch.allclose(
            (checkpoint.read(name).float() - base)[:16, :16], blocks[name].values[0].float(), atol=0.01
        )
    assert swquant.verify(tmp_path / "out") == []


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gemma3", "opt", "mixtral"])
def test_architectures(architecture: str, tmp_path: Path) -> None:
    """Conv1D, fused projections, biases, tied heads; of a mixture the layers that are no experts."""
    planted_model(architecture, tmp_path / "model")
    swquant.compress(tmp_path / "model", tmp_path / "c", prompt=PROMPT, block="32")
    with CompressedCheckpoint(tmp_path / "c") as checkpoint:
        model = trainable_model(checkpoint)
        weights = linear_names(describe(checkpoint), model)
        assert not any("expert" in name for name in weights)
        assert {name for name in checkpoint.quantized_names if "expert" not in name} <= set(weights)
        layers = lay(model, checkpoint, weights, planned(checkpoint, weights, side=24))
        training = model(TOKENS).logits
        training.square().sum().backward()
        assert all(layer.values.grad is not None and bool(layer.values.grad.any()) for layer in layers.values())
        stored = {name: layer.trained(torch.float32) for name, layer in layers.items()}
        write_patched(checkpoint, tmp_path / "out", "tuned", stored, record(stored))
    loaded = swquant.load(tmp_path / "out", dtype=torch.float32)(TOKENS).logits
    assert torch.allclose(training, loaded, atol=1e-3)


def test_gradients_through_a_whole_model_are_those_of_the_dense_one(compressed: Path) -> None:
    with CompressedCheckpoint(compressed) as checkpoint:
        model = trainable_model(checkpoint)
        weights = linear_names(describe(checkpoint), model)
        names = list(weights)[::5]
        dense = {name: model.get_submodule(weights[name].module).weight.requires_grad_() for name in names}
        of_dense = dict(
            zip(names, torch.autograd.grad(model(TOKENS).logits.square().mean(), dense.values()), strict=True)
        )
        model.requires_grad_(False)
        layers = lay(model, checkpoint, weights, planned(checkpoint, names, scale=0.0))
        model(TOKENS).logits.square().mean().backward()
    for name, layer in layers.items():
        assert layer.values.grad is not None
        assert torch.allclose(layer.values.grad[0], of_dense[name][:16, :16], rtol=1e-3, atol=1e-6)
        assert torch.allclose(layer.values.grad[-1], of_dense[name][-16:, -16:], rtol=1e-3, atol=1e-6)


def test_rounded_activations_and_missing_sidecars_are_refused(
    bf16_llama: Planted, compressed: Path, tmp_path: Path
) -> None:
    swquant.compress(bf16_llama.folder, tmp_path / "w8a8", prompt=PROMPT, bits=8, activations="int8")
    with open_checkpoint(tmp_path / "w8a8") as checkpoint, pytest.raises(SwquantError, match="has no gradient"):
        trainable_model(checkpoint)
    shutil.copytree(compressed, tmp_path / "c")
    with CompressedCheckpoint(tmp_path / "c") as checkpoint:
        blocks = planned(checkpoint, [checkpoint.quantized_names[0]])
        (tmp_path / "c" / SIDECAR).unlink()
        with pytest.raises(SwquantError, match="is missing"):
            write_patched(checkpoint, tmp_path / "out", "tuned", blocks, record(blocks))
    assert not (tmp_path / "out").exists()


def test_evaluation_sees_the_blocks(compressed: Path, tmp_path: Path) -> None:
    with CompressedCheckpoint(compressed) as checkpoint:
        blocks = planned(checkpoint, checkpoint.quantized_names, scale=0.2)
        write_patched(checkpoint, tmp_path / "out", "tuned", blocks, record(blocks))
    text = sample_text(60)
    assert swquant.evaluate(tmp_path / "out", text).perplexity != swquant.evaluate(compressed, text).perplexity


def test_exports_refuse_what_they_cannot_hold(compressed: Path, tmp_path: Path) -> None:
    """Blocks that replace a weight have no node, and a GGUF file holds codes alone."""
    with CompressedCheckpoint(compressed) as checkpoint:
        name = checkpoint.quantized_names[0]
        blocks = planned(checkpoint, [name])
        replacing = {name: replace(blocks[name], mode="replace")}
        write_patched(checkpoint, tmp_path / "out", "tuned", replacing, record(blocks))
    with pytest.raises(SwquantError, match="those of its set tuned replace what they lie on"):
        swquant.export(tmp_path / "out", tmp_path / "onnx")
    with pytest.raises(SwquantError, match="its set tuned; swquant merge bakes them into"):
        swquant.export(tmp_path / "out", tmp_path / "model.gguf")
