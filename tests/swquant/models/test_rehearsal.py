"""What stock transformers would load wrong is mended or refused before a byte is written: a handful of architectures
that were loaded with random weights, crashed in the loader, or were refused without need. All of them: `make
architectures`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import every_architecture
from support.sweep import RIGHT, outcome
from support.tiny_models import PROMPT, Planted, planted_model, save_model, tiny_model
from transformers import AutoModelForCausalLM

import swquant
from exporters.json_file import read_json
from swquant.checkpoints.open import open_checkpoint
from swquant.compress import rehearsal
from swquant.compress.choice import Decoded
from swquant.compress.config import checkpoint_config
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import prepare
from swquant.compress.rehearsal import rehearsed_plan
from swquant.models.architecture import describe
from swquant.models.rehearsal import rehearse

# What each stands for.
KINDS = {
    "gemma3": "stored under other names than it is built with; a vision tower",
    "nanochat": "its own code sets up a weight that a packed layer lacks",
    "cpmant": "a head that the configuration claims to be tied, and is not",
    "hunyuan_v1_moe": "a router under an odd name, kept in float32",
    "qwen3_5": "a composite configuration with a text class",
    "xlm": "decoder layers in several lists",
    "mamba": "a product that the prompt does not reach",
    "qwen2_5_vl": "an image-text model that no causal class knows",
    "falcon": "linear layers with a forward of their own",
    "ctrl": "a buffer that its own code replaces",
    "mllama": "layers that are called after attention",
}


@pytest.mark.parametrize("model_type", KINDS)
def test_stock_transformers_loads_it_right_to_the_bit(model_type: str, tmp_path: Path) -> None:
    found = outcome(model_type, tmp_path)
    assert (found["outcome"], found["detail"]) == (RIGHT, "")
    assert found["packed"] > 0


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4_text"])
def test_what_cannot_be_packed_by_half_is_refused_before_anything_is_written(model_type: str, tmp_path: Path) -> None:
    source = every_architecture.save(every_architecture.build(model_type), tmp_path / "source")
    with pytest.raises(swquant.SwquantError, match=r"would be packed \(experts fused|could not load"):
        swquant.compress(source, tmp_path / "out", block="32")
    assert not (tmp_path / "out").exists()


def test_allow_dense_goes_on(tmp_path: Path) -> None:
    source = every_architecture.save(every_architecture.build("gpt_oss"), tmp_path / "source")
    manifest = swquant.compress(source, tmp_path / "out", block="32", allow_dense=True).manifest
    assert sum("bits" in record for record in manifest["tensors"].values()) == 16


def test_the_rehearsal_sees_a_missing_weight_a_wrong_shape_and_a_lacking_one(bf16_llama: Planted) -> None:
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        prepared = prepare(checkpoint, CompressOptions(block="32", prompt=PROMPT))
        config = checkpoint_config(checkpoint, prepared.plan, prepared.found.architecture)
        layout = {name: form for tensor in prepared.plan.tensors for name, form in tensor.layout.items()}
        assert rehearse(checkpoint, config, layout).problem == ""
        name = "model.layers.2.mlp.up_proj.weight_packed"
        without = {key: form for key, form in layout.items() if key != name}
        assert rehearse(checkpoint, config, without).missing == (name,)
        other = {**layout, "model.norm.weight": (torch.bfloat16, (3,))}
        assert rehearse(checkpoint, config, other).mismatched == ("model.norm.weight",)
        # A plan that packs what its configuration does not name would leave random weights.
        config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["targets"] = [r"re:^model\.layers\.[1-5]\..*"]
        assert "missing" in rehearse(checkpoint, config, layout).problem


def test_a_head_that_differs_from_the_embedding_is_written_whatever_the_configuration_claims(tmp_path: Path) -> None:
    """And one that is equal to it is not."""
    model = tiny_model("llama")
    folder = save_model(model, tmp_path / "model", torch.bfloat16)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    manifest = swquant.compress(folder, tmp_path / "out", block="32", prompt=PROMPT).manifest
    assert "lm_head.weight" in manifest["tensors"]
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    folder = save_model(model, tmp_path / "equal", torch.bfloat16)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    manifest = swquant.compress(folder, tmp_path / "tied", block="32", prompt=PROMPT).manifest
    assert manifest["left_out"] == {"lm_head.weight": "tied to the embedding"}


def test_a_plan_that_nothing_mends_is_refused(bf16_llama: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "checkpoint_config", lambda *_: {"model_type": "llama", "quantization_config": {}})
    with open_checkpoint(bf16_llama.folder) as checkpoint:
        architecture = describe(checkpoint)
        with pytest.raises(swquant.SwquantError, match="could not load what would be written"):
            rehearsed_plan(checkpoint, architecture, lambda _, **__: _Nothing)


def test_what_no_module_can_hold_is_decoded_while_loading(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds [in, out]: blocks run along the outputs, and so do places in the sidecar."""
    planted = planted_model("gpt2", tmp_path / "model", torch.bfloat16)
    manifest = swquant.compress(planted.folder, tmp_path / "out", block="32", prompt=PROMPT).manifest
    assert read_json(tmp_path / "out/config.json")["quantization_config"]["dequantize"] is True
    (code,) = manifest["tensors"][planted.name]["super_weights"]
    assert (code["row"], code["col"], code["without_sidecar"]) == (planted.col, planted.row, 60.0)
    assert "decodes it while loading" in manifest["loaders"]["transformers"]
    original, stock = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out"))
    ours = swquant.load(tmp_path / "out", restore=False)
    weights = dict(original.named_parameters())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, dict(stock.named_parameters())[name])
        assert (
            not (name in manifest["tensors"] and "bits" in manifest["tensors"][name]) or weight.ne(weights[name]).any()
        )


def test_weights_that_share_no_scheme_are_not_decoded_while_loading(tmp_path: Path) -> None:
    planted = planted_model("gpt2", tmp_path / "model", torch.bfloat16)
    mixed = {"prompt": PROMPT, "bits_for": ("c_fc=3",)}
    with pytest.raises(swquant.SwquantError, match="nothing would be compressed; 24 tensors: Conv1D"):
        swquant.compress(planted.folder, tmp_path / "out", block="32", **mixed)


def test_weights_that_the_model_keeps_in_float32_must_stay_so(tmp_path: Path) -> None:
    """Decoding while loading would make bfloat16 of them, and the model would mix dtypes."""
    source = every_architecture.save(every_architecture.build("deepseek_v4"), tmp_path / "source")
    with open_checkpoint(source) as checkpoint:
        prepared = prepare(checkpoint, CompressOptions(block="32"))
        assert not prepared.plan.decoded
        config = checkpoint_config(checkpoint, prepared.plan, prepared.found.architecture)
        layout = {name: form for tensor in prepared.plan.tensors for name, form in tensor.layout.items()}
        assert rehearse(checkpoint, config, layout).problem == ""
        config["quantization_config"]["dequantize"] = True
        assert "would not be float32, as the model keeps it" in rehearse(checkpoint, config, layout).problem


class _Nothing:
    """A plan of no tensors."""

    tensors = ()
    quantized = ()
    tables = ()
    decoded = Decoded.NOTHING
