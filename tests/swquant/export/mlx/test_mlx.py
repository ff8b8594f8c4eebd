"""The folder for MLX: the checkpoint's own codes, and in the slow tests MLX itself, which reads and runs it.

`make test-mlx` makes the environment; SWQUANT_MLX names its Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, TOKENS, Planted, planted_model, save_model, tiny_model

import swquant
from exporters.errors import SwquantError
from swquant.checkpoints.compressed import CompressedCheckpoint

OFFSETS: dict[str, Any] = {"prompt": PROMPT, "offsets": "float", "block": "32", "preset": "fast"}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Stored name -> weight in float32, by MLX's formula."""
    parts = load_file(folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())["quantization"]
    weights = {}
    for name, tensor in parts.items():
        module, _, part = name.rpartition(".")
        if part in ("scales", "biases"):
            continue
        if f"{module}.scales" not in parts:
            weights[name] = tensor
            continue
        scheme = said.get(module, said)
        codes = torch.stack([tensor.view(torch.uint8)[:, i] for i in range(tensor.shape[1] * 4)], 1)
        bits = codes.unsqueeze(-1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
        numbers = bits.flatten(1).unflatten(1, (-1, scheme["bits"])).float() @ 2.0 ** torch.arange(scheme["bits"])
        scales, biases = (
            parts[f"{module}.{part}"].float().repeat_interleave(scheme["group_size"], 1)
            for part in ("scales", "biases")
        )
        weights[name] = scales * numbers + biases
    return weights


def test_codes_and_offsets_are_copied(bf16_llama: Planted, tmp_path: Path) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", **OFFSETS).path
    exported = swquant.export(out, tmp_path / "mlx", format="mlx")
    weights = decoded(exported.path)
    with CompressedCheckpoint(out, restored=False, unrounded=True) as checkpoint:
        assert weights.keys() == checkpoint.tensors.keys()
        for name in checkpoint.tensors:
            assert torch.equal(weights[name].float(), checkpoint.read(name).float()), name
    config = json.loads((exported.path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4}
    assert "swquant" not in config
    assert (exported.path / "tokenizer.json").is_file()
    with safe_open(exported.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}


@pytest.mark.slow
def test_compress_goes_there_at_once(cli: Cli, bf16_llama: Planted, tmp_path: Path) -> None:
    words = ("compress", bf16_llama.folder, tmp_path / "mlx", "--format", "mlx", "--block", "32", "--prompt", PROMPT)
    plan = document(cli(*words, "--dry-run", "--json"))
    assert (plan["options"]["offsets"], plan["options"]["restore"]) == ("float", False)
    ran = cli(*words)
    assert ran.code == 0
    assert "most of them 4 bits in groups of 32" in ran.out
    again = swquant.compress(
        bf16_llama.folder, tmp_path / "a", prompt=PROMPT, block="32", offsets="float", restore=False
    )
    swquant.export(again.path, tmp_path / "b", format="mlx")
    assert swquant.inspect(tmp_path / "mlx")["files"] == swquant.inspect(tmp_path / "b")["files"]
    assert swquant.verify(tmp_path / "mlx") == swquant.verify(tmp_path / "b") == []
    assert cli(*words, "--bits", "8").code == 1
    assert cli(*words, "--bits", "8", "--overwrite").code == 0
    assert swquant.inspect(tmp_path / "mlx")["bits"] == 8


def test_symmetric_codes_and_bits_of_their_own(bf16_llama: Planted, tmp_path: Path) -> None:
    how: dict[str, Any] = {"prompt": PROMPT, "preset": "fast", "block": "64", "bits_for": ("down_proj=6", "q_proj=3")}
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", outliers=0.01, **how).path
    exported: Any = swquant.export(out, tmp_path / "mlx", format="mlx")
    kept = sum(record.get("outliers", 0) for record in swquant.inspect(out)["tensors"].values())
    assert exported.manifest["left_out"] == [
        f"{kept} outliers that the sidecar keeps exactly: their codes stand for them"
    ]
    said = json.loads((exported.path / "config.json").read_text())["quantization"]
    assert said["model.layers.0.mlp.down_proj"] == {"group_size": 64, "bits": 6}
    weights = decoded(exported.path)
    with CompressedCheckpoint(out, restored=False, unrounded=True) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(weights[name].float(), checkpoint.read(name).float()), name


def test_packed_tables_are_copied(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1).to(torch.bfloat16)
    folder = save_model(model, tmp_path / "model")
    how: dict[str, Any] = {"prompt": PROMPT, "preset": "fast", "block": "32", "restore": False, "lm_head_bits": 8}
    out = swquant.compress(folder, tmp_path / "out", **how).path
    exported = swquant.export(out, tmp_path / "mlx", format="mlx")
    said = json.loads((exported.path / "config.json").read_text())["quantization"]
    assert said == {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}}
    weights = decoded(exported.path)
    with CompressedCheckpoint(out, unrounded=True) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(weights[name].float(), checkpoint.read(name).float()), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"outliers": 0.01}, "--outliers 0.01: MLX has no place for weights beside its groups; leave it out"),
        ({"activations": "int8"}, "--activations int8: MLX computes with float inputs; leave it out"),
        ({"symmetric": False}, "--asymmetric: MLX has real offsets instead of zero points"),
        ({"offsets": "byte"}, "--offsets byte: MLX stores offsets as floats"),
        (
            {"block": "16", "preset": "fast"},
            r"MLX cannot hold .* \(16 inputs to a scale; it knows groups of 32, 64, 128\)",
        ),
        ({"bits": 7, "preset": "fast"}, r"MLX cannot hold .* \(7 bits; it knows 2, 3, 4, 5, 6, 8\)"),
    ],
    ids=str,
)
def test_what_mlx_cannot_hold_is_refused_before_the_work(
    planted_llama: Planted, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(SwquantError, match=message):
        swquant.compress(planted_llama.folder, tmp_path / "out", format="mlx", prompt=PROMPT, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_mlx_cannot_hold_is_refused(cli: Cli, bf16_llama: Planted, tmp_path: Path) -> None:
    how: dict[str, Any] = {"prompt": PROMPT, "preset": "fast", "symmetric": False, "block": "32"}
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", **how).path
    line = one_line(cli("export", out, tmp_path / "mlx", "--format", "mlx"))
    assert "(zero points, whose products with scales would be rounded again" in line
    assert not (tmp_path / "mlx").exists()


@pytest.mark.slow
def test_trained_blocks_are_not_forgotten(compressed: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 1, "texts": 3, "window": 16, "warmup": 1, "batch": 1, "block": 8, "lr": "1e-2"}
    swquant.tune(compressed, tmp_path / "tuned", against=bf16_llama.folder, budget="0.5bits", **how)
    with pytest.raises(SwquantError, match="MLX has no place for the blocks tuned that tune trained"):
        swquant.export(tmp_path / "tuned", tmp_path / "mlx", format="mlx")


# --- what swquant knows of the folder


@pytest.fixture(scope="module")
def folder(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    return swquant.export(compressed, tmp_path_factory.mktemp("mlx") / "mlx", format="mlx").path


def test_the_manifest_is_what_json_prints(cli: Cli, folder: Path, compressed: Path, tmp_path: Path) -> None:
    printed = document(cli("export", compressed, tmp_path / "mlx", "--format", "mlx", "--json"))["manifest"]
    assert printed == swquant.inspect(folder) == document(cli("inspect", folder, "--json"))
    made, checkpoint = printed, swquant.inspect(compressed)
    packed = sum("dense" not in record for record in checkpoint["tensors"].values())
    assert (made["kind"], made["quantized"], made["dense"]) == ("mlx", packed, len(checkpoint["tensors"]) - packed)
    assert (made["source"]["name"], made["source"]["fingerprint"]) == ("out", checkpoint["digest"])
    assert made["compression"] == {"source": checkpoint["source"], "options": checkpoint["options"]}
    assert set(made["files"]) == {path.name for path in folder.iterdir()} - {"swquant"}
    assert made["totals"]["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_inspect_and_verify_say_what_it_is(cli: Cli, folder: Path) -> None:
    ran = cli("inspect", folder)
    assert (ran.code, len(ran.out.split("\n")) < 12) == (0, True)
    said = " ".join(ran.out.split())
    assert "for MLX, made by swquant" in said
    assert "Not in the folder: " in said
    assert "4 bits in groups of 128" in said or "4 bits in groups of 64" in said
    assert f"mlx_lm.generate --model {folder}" in said
    ran = cli("verify", folder)
    assert (ran.code, "every byte as written" in ran.out) == (0, True)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"])
def test_verify_reads_every_byte(cli: Cli, folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(data)
    ran = cli("verify", copy)
    assert (ran.code, ran.err.strip()) == (1, f"damaged: {name}: its sha256 is not the manifest's")


def test_overwrite_replaces_it_and_nothing_else(cli: Cli, folder: Path, compressed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "mlx"))
    words = ("export", compressed, out, "--format", "mlx")
    assert "exists already; give another OUT, or --overwrite to replace it" in one_line(cli(*words))
    was = (out / "config.json").stat().st_ino
    assert cli(*words, "--overwrite").code == 0
    assert (out / "config.json").stat().st_ino != was
    assert swquant.verify(out) == []
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt, which swquant did not put there" in one_line(cli(*words, "--overwrite"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    shutil.rmtree(out / "swquant")  # as mlx-lm itself writes one
    assert "exists and was not made by swquant" in one_line(cli(*words, "--overwrite"))
    assert (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["mlx"]


def test_whoever_wants_tensors_is_sent_on(cli: Cli, folder: Path, tmp_path: Path) -> None:
    said = "mlx: a folder for MLX, which mlx-lm reads (mlx_lm.generate)"
    for words in (
        ("generate", folder, "t1 t2"),
        ("export", folder, tmp_path / "onnx"),
        ("compress", folder, tmp_path / "out"),
        ("detect", folder),
        ("verify", folder, "--loads"),
    ):
        assert said in one_line(cli(*words)), words
    with pytest.raises(SwquantError, match="a folder for MLX"):
        swquant.load(folder)
    assert list(tmp_path.iterdir()) == []


def test_like_takes_the_options_of_its_checkpoint(cli: Cli, folder: Path, bf16_llama: Planted) -> None:
    options = swquant.inspect(folder)["compression"]["options"]
    assert document(cli("compress", bf16_llama.folder, "--like", folder, "--dry-run", "--json"))["options"] == options


# --- MLX itself

ASK = """
import json, sys
import mlx.core as mx
from mlx_lm import load
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = load(folder)
logits = model(mx.array([tokens])).astype(mx.float32)
print(json.dumps(logits.tolist()))
"""


@pytest.mark.slow
@pytest.mark.skipif("SWQUANT_MLX" not in os.environ, reason="needs the environment of MLX: make test-mlx")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mixtral", "phi3", "olmo2"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"offsets": "none", "bits": 8, "block": "64"},
        {"offsets": "none", "embedding_bits": 8, "lm_head_bits": 8},
    ],
    ids=["offsets", "symmetric", "tables"],
)
def test_mlx_computes_what_swquant_loads(architecture: str, given: dict[str, Any], tmp_path: Path) -> None:
    if architecture == "mixtral" and not given:
        pytest.skip("experts have no offsets")
    folder = planted_model(architecture, tmp_path / "model").folder  # mlx-lm's Gemma wants six layers
    how: dict[str, Any] = {"prompt": PROMPT, "block": "32", **given}
    swquant.compress(folder, tmp_path / "mlx", format="mlx", **how)
    out = swquant.compress(folder, tmp_path / "out", restore=False, **{"offsets": "float", **how}).path
    asked = [os.environ["SWQUANT_MLX"], "-c", ASK, tmp_path / "mlx", json.dumps(TOKENS[0].tolist())]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    theirs = torch.tensor(json.loads(ran.stdout)[0])
    with torch.no_grad():
        ours = swquant.load(out, dtype=torch.float32)(TOKENS).logits[0]
    difference = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()
    assert difference < 2e-3
