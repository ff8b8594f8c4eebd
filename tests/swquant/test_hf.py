"""`import swquant.hf`: stock `from_pretrained` gives what `swquant.load` gives, and compresses on the fly."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import PROMPT, TOKENS, Planted, planted_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import swquant
from exporters.errors import SwquantError


@pytest.fixture(autouse=True)
def hf() -> Any:
    """The module; tests/conftest.py takes it back afterwards, since other tests ask what stock loaders do."""
    return importlib.import_module("swquant.hf")


def assert_same(model: Any, expected: Any) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


KINDS: dict[str, tuple[str, dict]] = {
    "default": ("llama", {"outliers": 0.01}),
    "asymmetric, odd bits": ("qwen3", {"bits": 3, "symmetric": False, "outliers": 0.01}),
    "offsets": ("llama", {"offsets": "float", "block": "32"}),
    "w8a8": ("llama", {"bits": 8, "activations": "int8"}),
    "w4a8, static": ("llama", {"activations": "int8", "activation_range": "static"}),
    "decoded while loading": ("gpt2", {"outliers": 0.01}),
    "experts": ("mixtral", {"outliers": 0.01}),
    "other experts": ("qwen3_moe", {"outliers": 0.01}),
    "tied": ("gemma3", {"outliers": 0.01}),
}


FAST = ("default", "w4a8, static", "experts")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_from_pretrained_is_load(kind: str, tmp_path: Path) -> None:
    architecture, options = KINDS[kind]
    source = planted_model(architecture, tmp_path / "model", torch.bfloat16, num_hidden_layers=2).folder
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, preset="fast", **options).path
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_same(model, swquant.load(out))
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")  # an ordinary model
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert not {"quantization_config", "swquant"} & set(config)


@pytest.mark.slow
def test_trained_blocks_are_laid_over(compressed: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 2, "texts": 3, "window": 16, "warmup": 1, "batch": 1, "block": 8, "lr": 1e-2}
    swquant.tune(compressed, tmp_path / "tuned", against=bf16_llama.folder, budget="0.5bits", **how)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), swquant.load(tmp_path / "tuned"))


def test_dtype_and_class_are_the_users(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32, device_map="cpu")
    assert_same(model, swquant.load(compressed, dtype=torch.float32))
    base = AutoModel.from_pretrained(compressed)  # whose names lack `model.`
    whole = swquant.load(compressed).model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in base.state_dict().items())


def test_a_damaged_weight_is_not_loaded(damaged: Path) -> None:
    shard = damaged / "model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Exception, match="swquant verify|sha256|differs"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_what_is_not_ours_is_loaded_as_ever(compressed: Path, tmp_path: Path, hf: Any) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "plain"))
    shutil.rmtree(folder / "swquant")
    with pytest.raises(SwquantError, match="no swquant/manifest.json, though config.json names it"):
        AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["swquant"]
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert torch.equal(logits, swquant.load(compressed, restore=False)(TOKENS).logits)
        assert not torch.equal(logits, swquant.load(compressed)(TOKENS).logits)


def test_a_configuration_compresses_on_the_fly(bf16_llama: Planted, tmp_path: Path, hf: Any) -> None:
    options: dict[str, Any] = {"bits": 3, "block": "32", "prompt": PROMPT, "outliers": 0.01}
    model = AutoModelForCausalLM.from_pretrained(bf16_llama.folder, quantization_config=hf.SwquantConfig(**options))
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", **options).path
    assert_same(model, swquant.load(out))
    assert not list(Path(bf16_llama.folder).parent.glob("*swquant*"))


def test_a_configuration_knows_its_options(hf: Any) -> None:
    assert hf.SwquantConfig(bits=3).to_dict() == {"quant_method": "swquant", "bits": 3}
    with pytest.raises(SwquantError, match="SwquantConfig has no option 'bit'"):
        hf.SwquantConfig(bit=3)
    with pytest.raises(SwquantError, match="bits 9 is outside"):
        hf.SwquantConfig(bits=9)


def test_it_can_be_taken_back(compressed: Path, hf: Any) -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    hf.register()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    hf.unregister()
    hf.unregister()
    assert not any(issubclass(kind, hf.SwquantQuantizer) for kind in auto.AUTO_QUANTIZER_MAPPING.values())
    assert "swquant" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, swquant.load(compressed)(TOKENS).logits)


def test_swquant_alone_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, swquant; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
