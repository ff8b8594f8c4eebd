"""Real models, end to end. `make test` fetches SmolLM2 first, `make test-slow` Gemma 3; without the files the tests are
skipped, but never in CI."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.paths import PROJECT
from support.real_models import GEMMA, SMOLLM2, real_model
from transformers import AutoTokenizer

import swquant
from calibrationless import SuperWeight
from swquant.detect.found import Found

EXCERPT = PROJECT / "data/wikitext2-excerpt.txt"

# Runs where none of our packages can be imported. Leaves the logits of some tokens and a hash of every weight.
STOCK = """
import sys
for name in ("swquant", "exporters", "calibrationless"):
    sys.modules[name] = None
import hashlib, json, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, tokens, target = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0]
hashes = {n: hashlib.sha256(p.detach().view(torch.uint8).numpy().data).hexdigest() for n, p in model.named_parameters()}
save_file({"logits": logits}, target, {"hashes": json.dumps(hashes)})
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_model(SMOLLM2)


@pytest.fixture(scope="module")
def compressed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 at 4 bits in blocks of 128, made on two threads."""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    return swquant.compress(smollm2, out, bits=4, block="128").path


@pytest.fixture(scope="module")
def found(smollm2: Path) -> Found:
    return swquant.detect(smollm2)


def place(weight: SuperWeight) -> tuple[str, int, int, int]:
    assert weight.name == f"model.layers.{weight.layer}.mlp.down_proj.weight"
    return weight.role, weight.layer, weight.row, weight.col


def test_smollm2_has_one_super_weight_and_a_companion(found: Found) -> None:
    creator, companion = found.detection.super_weights
    assert place(creator) == ("creator", 11, 507, 1229)
    assert place(companion) == ("companion", 11, 507, 1487)
    assert creator.value == pytest.approx(5.875, rel=1e-3)
    assert creator.input == pytest.approx(2996, rel=1e-3)
    assert creator.output == pytest.approx(24022, rel=1e-3)
    assert creator.share == pytest.approx(0.73, abs=0.01)
    assert companion.share == pytest.approx(0.26, abs=0.01)
    assert creator.kl > 4 * companion.kl > 1  # without it, the model is another


def test_smollm2_takes_the_super_activation_away_in_its_last_layers(found: Found) -> None:
    assert [place(weight) for weight in found.detection.cancellers] == [
        ("canceller", 28, 507, 678),
        ("canceller", 29, 507, 1165),
        ("canceller", 29, 507, 999),
    ]
    (activation,) = found.detection.super_activations
    assert (activation.channel, activation.token, activation.born, activation.gone) == (507, 0, 11, 28)
    assert min(activation.magnitudes[12:29]) > 23_000  # after each of layers 11 to 27
    assert found.tokens[0] == "Apple"  # SmolLM2's tokenizer adds no BOS
    assert found.published == ()


def test_smollm2_is_compressed_as_planned(compressed: Path) -> None:
    assert swquant.verify(compressed) == []
    manifest = swquant.inspect(compressed)
    schemes = {}
    for record in manifest["tensors"].values():
        kind = record.get("stored_as") or record["dense"]
        schemes[kind] = schemes.get(kind, 0) + 1
    assert schemes == {  # 576 inputs are no multiple of 128
        "int4 group 64 symmetric": 180, "int4 group 128 symmetric": 30, "embedding": 1, "not a matrix": 61,
    }  # fmt: skip
    assert manifest["totals"]["bits_per_quantized_weight"] == pytest.approx(4.267, abs=0.001)
    points = manifest["tensors"]["model.layers.11.mlp.down_proj.weight"]["super_weights"]
    assert [(point["row"], point["col"]) for point in points] == [(507, 1229), (507, 1487)]
    for point in points:  # the safety rule: a loader without the sidecar has them, too
        assert point["without_sidecar"] == pytest.approx(point["value"], rel=2**-8)


def test_stock_transformers_gives_what_we_give_without_the_sidecar(compressed: Path, tmp_path: Path) -> None:
    tokens = some_tokens(compressed)
    target = tmp_path / "stock.safetensors"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK, str(compressed), str(tokens), str(target)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    stock, hashes = load_file(target)["logits"], metadata(target)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = swquant.load(compressed, restore=False)
        with torch.no_grad():
            ours = model(torch.tensor([tokens])).logits[0]
    finally:
        torch.set_num_threads(threads)
    expected = {name: digest(parameter) for name, parameter in model.named_parameters()}
    assert {name: hashes.pop(name) for name in expected} == expected
    assert all(name.endswith((".weight_scale", ".weight_shape")) for name in hashes)  # what decoding leaves behind
    assert torch.equal(stock, ours)


def some_tokens(folder: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)("The capital of France is Paris.")["input_ids"])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().view(torch.uint8).numpy().data).hexdigest()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hashes"])


@pytest.mark.slow
def test_the_script_for_ci_makes_the_same_bytes_on_one_thread(smollm2: Path, compressed: Path, tmp_path: Path) -> None:
    """tools/make_checkpoint.sh in a real shell, on one thread: compress, verify, and the gate of the evaluation."""
    link = tmp_path / smollm2.name  # the name is part of the manifest
    link.symlink_to(smollm2)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WINDOW": "128",
        "WINDOWS": "1",
    }
    script = [PROJECT / "tools/make_checkpoint.sh", link, tmp_path / "out", EXCERPT]
    good = subprocess.run(
        [*script, "1.0", "--bits", "4", "--block", "128"], env=environment, capture_output=True, text=True
    )
    assert good.returncode == 0, good.stderr
    assert "every byte as written" in good.stdout
    assert "KL divergence from the original" in good.stdout
    assert files_of(tmp_path / "out") == files_of(compressed)


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_compressed_model_is_close_to_the_original(smollm2: Path, compressed: Path) -> None:
    result = swquant.evaluate(compressed, EXCERPT.read_text(encoding="utf-8"), smollm2, window=256, limit=2)
    assert result.tokens == 2 * 255
    assert result.original_perplexity == pytest.approx(22.460, rel=0.002)
    assert result.perplexity == pytest.approx(24.44, rel=0.02)
    assert result.kl == pytest.approx(0.182, rel=0.05)
    assert result.top1 == pytest.approx(0.790, abs=0.02)


@pytest.mark.slow
def test_gemma_has_its_super_weight_in_the_first_layer() -> None:
    found = swquant.detect(real_model(GEMMA))
    creator = found.detection.super_weights[0]
    assert place(creator) == ("creator", 0, 400, 1405)
    assert creator.input == pytest.approx(139, rel=0.01)
    assert creator.output == pytest.approx(28.6, rel=0.01)
    assert abs(creator.residual) == pytest.approx(2984, rel=0.01)  # the gain of the norm behind it
    assert creator.share == pytest.approx(0.99, abs=0.01)
    assert found.tokens[0] == "<bos>"
