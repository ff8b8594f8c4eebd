"""INT8 activations from end to end: what is kept, what stock loaders see, that decoding token by token stays right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.command_line import Cli
from support.tiny_models import (
    PROMPT,
    TOKENS,
    Planted,
    plant,
    planted_model,
    read_config,
    sample_text,
    save_model,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import swquant
from calibrationless import activation_codes, activation_scale, massive_channels
from exporters.errors import SwquantError
from exporters.json_file import read_json
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import MANIFEST, write_manifest
from swquant.models.rounded_inputs import RoundedLinear

_FEW, _MORE = ("llama", "gemma3", "mixtral"), ("mistral", "qwen3", "olmo2", "phi3", "gpt_neox", "opt", "qwen3_moe")
FAMILIES = [*_FEW, *(pytest.param(family, marks=pytest.mark.slow) for family in _MORE)]
MIXTURES = ("mixtral", "qwen3_moe")


def logits(model: PreTrainedModel, ids: torch.Tensor = TOKENS, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits.float()


def rounded(model: nn.Module) -> dict[str, RoundedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RoundedLinear)}


@pytest.fixture(scope="session")
def w8a8(bf16_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted llama at 8 bits with int8 activations per token. Do not change it."""
    out = tmp_path_factory.mktemp("w8a8") / "out"
    return swquant.compress(bf16_llama.folder, out, prompt=PROMPT, bits=8, activations="int8").path


@pytest.fixture(scope="session")
def w4a8(bf16_llama: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w4a8") / "out"
    return swquant.compress(bf16_llama.folder, out, prompt=PROMPT, block="32", activations="int8").path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rounds_the_inputs_of_its_linears_and_keeps_what_is_massive(family: str, tmp_path: Path) -> None:
    planted = planted_model(family, tmp_path / "model", torch.bfloat16)
    options = {"bits": 8, "activations": "int8", "refine": "none"}  # without scaled channels, whose peaks are others
    out = swquant.compress(planted.folder, tmp_path / "out", prompt=PROMPT, **options).path
    tensors = swquant.inspect(out)["tensors"]
    inputs = {name: record["inputs"] for name, record in tensors.items() if "inputs" in record}
    quantized = {name for name, record in tensors.items() if "dense" not in record}
    experts = {name for name in quantized if ".experts." in name}
    assert set(inputs) == quantized - experts
    assert bool(experts) == (family in MIXTURES)
    model = swquant.load(out, dtype=torch.float32)
    modules = rounded(model)
    assert len(modules) == len(inputs)
    seen: dict[str, torch.Tensor] = {}
    original = swquant.load(planted.folder, dtype=torch.float32)
    for name in modules:
        original.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].abs().flatten(0, -2).amax(0)})
        )
    logits(original, torch.tensor([swquant.inspect(out)["detection"]["token_ids"]]))
    for name, module in modules.items():
        assert torch.equal(module.keep.nonzero().flatten(), massive_channels(seen[name]).long()), name
    assert any(module.keep.any() for module in modules.values()) or family in MIXTURES
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "opt"))]
)
def test_transformers_loads_w8a8_and_rounds_the_activations_itself(family: str, tmp_path: Path) -> None:
    planted = planted_model(family, tmp_path / "model", torch.bfloat16)
    out = swquant.compress(planted.folder, tmp_path / "out", prompt=PROMPT, bits=8, activations="int8").path
    (group,) = read_config(out)["quantization_config"]["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs = logits(stock)
    assert all(stock.get_submodule(name).weight.is_floating_point() for name in rounded(swquant.load(out)))
    plain = logits(swquant.load(out, dtype=torch.float32, restore=False))
    # compressed-tensors divides by 127.5 where integer kernels and we divide by 127.
    assert float((theirs - plain).norm() / plain.norm()) < 2e-3
    weights = AutoModelForCausalLM.from_pretrained(planted.folder, dtype=torch.float32).eval()
    assert float((theirs - logits(weights)).norm() / logits(weights).norm()) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "block": "32"},
        {"bits": 8, "block": "32"},
        {"bits": 8, "symmetric": False},
        {"bits": 8, "activation_scale": "per-tensor"},
        {"bits": 8, "activation_range": "static"},
    ],
    ids=str,
)
def test_what_stock_loaders_cannot_say_leaves_activations_in_float_for_them(
    options: dict, bf16_llama: Planted, tmp_path: Path
) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, activations="int8", **options).path
    configured = read_config(out)["quantization_config"]
    assert configured["format"] == "pack-quantized"
    assert all(group["input_activations"] is None for group in configured["config_groups"].values())
    manifest = swquant.inspect(out)
    assert "leaves activations in float" in manifest["loaders"]["transformers"]
    assert "rounds activations" in manifest["loaders"]["swquant.load"]
    assert not rounded(swquant.load(out, restore=False))
    modules = rounded(swquant.load(out))
    assert len(modules) == 42
    assert {module.scale is not None for module in modules.values()} == {"activation_range" in options}
    assert {module.per_token for module in modules.values()} == {
        not {"activation_scale", "activation_range"} & set(options)
    }
    assert swquant.verify(out) == []


def test_the_module_is_an_integer_product_with_the_kept_channels_in_float(w8a8: Path, bf16_llama: Planted) -> None:
    model = swquant.load(w8a8, dtype=torch.float32)
    with CompressedCheckpoint(w8a8, restored=False) as checkpoint:
        kept = 0
        for name, module in rounded(model).items():
            module.weight.data = checkpoint.read(f"{name}.weight").float()  # without the sidecar: the codes alone
            quantized = checkpoint.quantized(f"{name}.weight")
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(1))
            x[:, module.keep] *= 300
            scale = activation_scale(x, module.keep, per_token=True)
            codes = activation_codes(x.masked_fill(module.keep, 0), scale).int()
            integers = (codes @ (quantized.codes.int() - 128).T).double()
            expected = integers * scale.double() * quantized.scale.double().T
            expected += x[:, module.keep].double() @ module.weight[:, module.keep].double().T
            with torch.no_grad():
                # bfloat16 weights are rounded once more when they are decoded
                torch.testing.assert_close(module(x).double(), expected, rtol=0.02, atol=0.05)
            kept += int(module.keep.sum())
    assert kept > 10


def test_keeping_the_massive_channels_is_what_keeps_the_model(tmp_path: Path) -> None:
    """With one scale per tensor, the planted super activation takes all levels for itself."""
    planted = planted_model("gemma3", tmp_path / "model", torch.float32)
    expected = logits(swquant.load(planted.folder))
    errors = {}
    for restore in (True, False):
        options = {"bits": 8, "activations": "int8", "activation_scale": "per-tensor", "restore": restore}
        out = swquant.compress(planted.folder, tmp_path / f"out-{restore}", prompt=PROMPT, **options).path
        ids = torch.tensor([[5, 77, 31, 90, 12, 8, 61, 23]])
        reference = logits(swquant.load(planted.folder), ids)
        errors[restore] = float((logits(swquant.load(out), ids) - reference).norm() / reference.norm())
    assert bool(torch.isfinite(expected).all())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("folder", ["w8a8", "w4a8"])
def test_decoding_token_by_token_is_what_reading_at_once_is(folder: str, request: pytest.FixtureRequest) -> None:
    """The super activation sits on the first token; later steps go through the cache and never see it."""
    model = swquant.load(request.getfixturevalue(folder), dtype=torch.float32)
    at_once = logits(model)[0]
    with torch.no_grad():
        first = model(TOKENS[:, :1], use_cache=True)  # a prompt of one token
        steps, past = [first.logits[0, 0]], first.past_key_values
        for index in range(1, TOKENS.shape[1]):
            output = model(TOKENS[:, index : index + 1], past_key_values=past, use_cache=True)
            steps.append(output.logits[0, 0])
            past = output.past_key_values
    torch.testing.assert_close(torch.stack(steps), at_once, rtol=1e-3, atol=2e-2)
    assert torch.equal(torch.stack(steps).argmax(-1), at_once.argmax(-1))


@pytest.mark.parametrize("folder", ["w8a8", "w4a8"])
def test_padding_on_the_left_and_unequal_neighbours_change_nothing(folder: str, request: pytest.FixtureRequest) -> None:
    model = swquant.load(request.getfixturevalue(folder), dtype=torch.float32)
    long, short = TOKENS[0], torch.tensor([77, 31, 5])  # the second does not begin with the prompt's first token
    pad = len(long) - len(short)
    batch = torch.stack([long, torch.cat([torch.full((pad,), 1), short])])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(together[0], logits(model, long.unsqueeze(0))[0], rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(together[1, pad:], logits(model, short.unsqueeze(0))[0], rtol=1e-3, atol=2e-2)


def test_generate_and_eval_run_with_rounded_activations(w8a8: Path, bf16_llama: Planted) -> None:
    assert swquant.generate(w8a8, "t77 t31", tokens=5) == swquant.generate(w8a8, "t77 t31", tokens=5)
    text = sample_text(120)
    result = swquant.evaluate(w8a8, text, against=bf16_llama.folder)
    assert result.kl is not None
    assert 0 < result.kl < 0.05


def test_inspect_says_where_the_super_activation_goes(w8a8: Path, cli: Cli) -> None:
    manifest = read_json(w8a8 / MANIFEST)
    (activation,) = manifest["detection"]["super_activations"]
    readers = [
        name
        for name, record in manifest["tensors"].items()
        if "inputs" in record and record["inputs"]["norm"] and activation["channel"] in record["inputs"]["channels"]
    ]
    assert readers
    ran = cli("inspect", w8a8)
    words = " ".join(ran.out.split())
    assert "Activations rounded to int8, per-token, dynamic" in words
    assert "layer 1" in words
    for kind in {name.split(".")[-2] for name in readers}:
        assert kind in words


def test_a_checkpoint_without_rounded_activations_says_nothing_of_them(compressed: Path, cli: Cli) -> None:
    assert "Activations" not in cli("inspect", compressed).out
    assert read_json(compressed / MANIFEST)["activations"] is None
    assert not rounded(swquant.load(compressed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": [128]}, "not all in 0 to 127"),
        ({"channels": [-1]}, "not all in 0 to 127"),
        ({"channels": ["5"]}, "inputs.channels.0 should be a valid integer"),
        ({"scale": 0.5}, "not one of range dynamic"),
    ],
)
def test_a_manifest_that_contradicts_the_weights_is_refused(
    change: dict, message: str, bf16_llama: Planted, tmp_path: Path
) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, bits=8, activations="int8").path
    manifest = read_json(out / MANIFEST)
    next(record for record in manifest["tensors"].values() if "inputs" in record)["inputs"] |= change
    write_manifest(out, {key: value for key, value in manifest.items() if key not in ("format", "version", "digest")})
    with pytest.raises(SwquantError, match=message):
        swquant.load(out)


def test_a_saved_model_is_a_plain_one(w8a8: Path, tmp_path: Path) -> None:
    """save_pretrained after load gives the dense weights and nothing of ours."""
    model = swquant.load(w8a8)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert not rounded(again)
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_a_model_without_super_weight_is_rounded_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = save_model(model, tmp_path / "model")
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, bits=8, activations="int8").path
    expected, result = logits(swquant.load(source)), logits(swquant.load(out))
    assert float((result - expected).norm() / expected.norm()) < 0.05
    plant(model)


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_onnx_graph_keeps_the_channels_that_the_checkpoint_names(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from swquant.models.onnx_model import OnnxModel

    model = tiny_model("llama", num_hidden_layers=3)
    plant(model)
    source = save_model(model, tmp_path / "model")
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, bits=bits, activations="int8").path
    folder = swquant.export(out, tmp_path / "onnx").path  # level 4, as the checkpoint says
    weights, tensors = swquant.inspect(folder)["weights"], swquant.inspect(out)["tensors"]
    named = {
        name.removesuffix(".weight"): record["inputs"]["channels"]
        for name, record in tensors.items()
        if "inputs" in record
    }
    assert any(named.values())
    assert {name: weight["channels"] for name, weight in weights.items()} == {k: len(v) for k, v in named.items()}
    rounded_model = swquant.load(out)
    graph = OnnxModel.open(folder / "model.onnx", rounded_model.config)
    ids = torch.tensor([[5, 77, 31, 90, 12, 8, 61, 23]])
    result, _ = graph.step(ids.numpy(), graph.empty_past(1))
    expected = logits(swquant.load(source), ids)
    assert float((torch.from_numpy(result) - expected).norm() / expected.norm()) < (0.02 if bits == 8 else 0.3)
