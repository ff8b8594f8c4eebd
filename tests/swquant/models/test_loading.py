"""What stock transformers loads, what `swquant.load` restores, and that the first is safe without the second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import every_architecture
from support.tiny_models import ARCHITECTURES, PROMPT, TOKENS, Planted, planted_model, save_model, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import swquant
from exporters.sidecar import OUTLIERS, SIDECAR, SidecarReader
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.detect.pipeline import watchable
from swquant.models import streaming
from swquant.models.converted import as_built
from swquant.models.loading import build_model, offloaded_model

LOADABLE = ("llama", "qwen3", "phi3", "gemma3", "mixtral", "qwen3_moe", "opt")

# Runs where none of our packages can be imported.
STOCK = """
import sys
for name in ("swquant", "exporters", "calibrationless"):
    sys.modules[name] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.tensor([[int(word[1:]) for word in sys.argv[1].split()]])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, folder + "/../logits.safetensors")
"""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits[0]


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference || other) in nats."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="session")
def compressed_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Planted, Path]]:
    """architecture -> (its planted super weight, the compressed model), in bfloat16."""
    models = {}
    for architecture in LOADABLE:
        folder = tmp_path_factory.mktemp(architecture)
        planted = planted_model(architecture, folder / "model", torch.bfloat16)
        models[architecture] = (planted, swquant.compress(planted.folder, folder / "out", prompt=PROMPT).path)
    return models


@pytest.mark.parametrize("architecture", LOADABLE)
def test_transformers_loads_what_the_codes_say(architecture: str, compressed_models: dict) -> None:
    _, out = compressed_models[architecture]
    dense = {record["dense"] for record in swquant.inspect(out)["tensors"].values() if "dense" in record}
    assert dense <= {"embedding", "lm_head", "not a matrix", "router"}  # nothing stays dense in silence
    stock = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    ours = swquant.load(out, restore=False)
    assert ours.dtype is torch.bfloat16
    assert torch.equal(logits(stock), logits(ours))


@pytest.mark.slow
def test_transformers_needs_nothing_of_ours(compressed_models: dict) -> None:
    folders = [str(out) for _, out in compressed_models.values()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", STOCK, PROMPT, *folders], env=environment, check=True, capture_output=True)
    for _, out in compressed_models.values():
        expected = logits(swquant.load(out, restore=False))
        assert torch.equal(load_file(out.parent / "logits.safetensors")["logits"][0], expected), out


@pytest.mark.parametrize("architecture", LOADABLE)
def test_the_super_weight_is_exact_again_after_loading(architecture: str, compressed_models: dict) -> None:
    planted, out = compressed_models[architecture]
    with CompressedCheckpoint(out) as checkpoint:
        assert checkpoint.read(planted.name)[planted.row, planted.col] == 60.0
    parameters = dict(swquant.load(out).named_parameters())
    assert any(60.0 in parameter[..., planted.row, planted.col] for parameter in down_projections(parameters))


def down_projections(parameters: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value for name, value in parameters.items() if "down_proj" in name or name.endswith("fc2.weight")]


def test_every_outlier_is_exact_again_after_loading(bf16_llama: Planted, compressed: Path) -> None:
    original = load_file(bf16_llama.folder / "model.safetensors")
    restored, plain = swquant.load(compressed).state_dict(), swquant.load(compressed, restore=False).state_dict()
    sidecar = SidecarReader(compressed / SIDECAR)
    assert len(sidecar.tensors) == 42
    for name in sidecar.tensors:
        points = sidecar.read(OUTLIERS, name, tuple(original[name].shape))
        at = (points.rows.long(), points.cols.long())
        ratio = torch.log2(restored[name][at].double() / original[name][at].double())  # columns scaled by powers of two
        assert torch.equal(ratio, ratio.round())
        changed = restored[name] != plain[name]
        assert int(changed.sum()) > 0
        changed[at] = False
        assert not changed.any()
    sidecar.close()


@pytest.mark.parametrize("clip", ["none", "z=1", "quantile=0.9"])
@pytest.mark.parametrize("block", ["32", "channel", "tensor", "64x64"])
def test_a_loader_that_ignores_the_sidecar_still_has_the_super_weight(
    bf16_llama: Planted, tmp_path: Path, clip: str, block: str
) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, clip=clip, block=block).path
    record = swquant.inspect(out)["tensors"][bf16_llama.name]
    if block in ("tensor", "64x64"):  # too many weights for one step that represents 60
        assert "super weight" in record["dense"]
    else:
        assert record["super_weights"] == [
            {"row": 37, "col": 101, "value": 60.0, "without_sidecar": pytest.approx(60, rel=0.05)}
        ]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    without = logits(stock)
    assert stock.get_parameter(bf16_llama.name)[37, 101].item() == pytest.approx(60, rel=0.05)
    model = swquant.load(out)
    restored = logits(model)
    with torch.no_grad():
        weight = model.get_parameter(bf16_llama.name)
        weight[37, 101] = torch.where(weight == 60, 0, weight).abs().max()  # what the rule would have made of it
    clipped = logits(model)
    assert divergence(restored, without) < 0.02
    assert divergence(restored, clipped) > 10 * divergence(restored, without)


def test_a_missing_weight_is_an_error_not_a_random_number(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(swquant.SwquantError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        swquant.load(source)
    with pytest.raises(swquant.SwquantError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        swquant.detect(source, PROMPT, low_memory=True)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_configuration_of_another_size_is_one_message(source: Path, key: str) -> None:
    path = source / "config.json"
    sizes = {"hidden_size": ("64", "80"), "intermediate_size": ("128", "256"), "vocab_size": ("128", "256")}
    old, new = sizes[key]
    path.write_text(path.read_text().replace(f'"{key}": {old}', f'"{key}": {new}'))
    with pytest.raises(swquant.SwquantError, match=r"shape.*config\.json"):
        swquant.load(source)


def test_a_missing_sidecar_is_an_error_not_a_model_without_outliers(damaged: Path) -> None:
    (damaged / SIDECAR).unlink()
    with pytest.raises(swquant.SwquantError, match=r"outliers\.safetensors"):
        swquant.load(damaged)
    swquant.load(damaged, restore=False)  # this one needs none


def test_a_model_without_outliers_has_no_sidecar_and_loads(control_llama: Path, tmp_path: Path) -> None:
    out = swquant.compress(control_llama, tmp_path / "out", prompt=PROMPT, outliers=0).path
    assert not (out / SIDECAR).exists()
    assert torch.equal(logits(swquant.load(out)), logits(swquant.load(out, restore=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, None])
def test_load_gives_the_dtype_asked_for(compressed: Path, dtype: torch.dtype | None) -> None:
    model = swquant.load(compressed, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}
    assert not model.training


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_detection_from_disk_finds_what_detection_in_memory_finds(architecture: str, tmp_path: Path) -> None:
    folder = planted_model(architecture, tmp_path / "model", torch.bfloat16).folder
    in_memory = swquant.detect(folder, PROMPT).detection
    from_disk = swquant.detect(folder, PROMPT, low_memory=True).detection
    assert from_disk.super_weights == in_memory.super_weights != ()
    assert from_disk.layers == in_memory.layers


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "dbrx", "jetmoe", "kosmos-2.5", "llama4_text"])
@pytest.mark.parametrize("large", [streaming._LARGE, 1], ids=["", "through files"])
def test_a_streamed_model_gives_what_the_model_in_memory_gives(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """dbrx, jetmoe and kosmos-2.5 take weights of modules that are not running, or ask where their weights are."""
    monkeypatch.setattr(streaming, "_LARGE", large)
    if architecture in ARCHITECTURES:
        folder = save_model(tiny_model(architecture).to(torch.bfloat16), tmp_path / "model")
    else:
        folder = every_architecture.save(every_architecture.build(architecture), tmp_path / "model")
    with open_checkpoint(folder) as opened:
        checkpoint = as_built(opened)
        whole = build_model(checkpoint, torch.float32)
        with watchable(whole):
            expected = every_architecture.logits_of(whole)
        with offloaded_model(checkpoint, torch.float32) as streamed, watchable(streamed):
            assert torch.equal(every_architecture.logits_of(streamed), expected)
            assert torch.equal(every_architecture.logits_of(streamed), expected)
            for name, parameter in streamed.named_parameters():
                assert parameter.untyped_storage().nbytes() <= 8, name
                assert bool(parameter.isnan().all())


def test_a_streamed_weight_is_gone_after_an_error(bf16_llama: Planted) -> None:
    with (
        open_checkpoint(bf16_llama.folder) as checkpoint,
        offloaded_model(checkpoint, torch.float32) as model,
    ):
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        assert not any(module._parameters.read for module in model.modules())  # type: ignore[attr-defined]
        assert torch.isfinite(logits(model)).all()


def test_a_compressed_model_keeps_its_super_weight(bf16_llama: Planted, compressed: Path) -> None:
    (weight,) = swquant.detect(compressed, PROMPT).detection.super_weights
    assert (weight.name, weight.row, weight.col, weight.value) == (bf16_llama.name, 37, 101, 60.0)


def test_eight_bits_are_close_to_the_original(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    out = swquant.compress(folder, tmp_path / "out", prompt=PROMPT, bits=8, block="32").path
    assert divergence(logits(swquant.load(folder)), logits(swquant.load(out))) < 1e-3
