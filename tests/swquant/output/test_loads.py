"""`verify --loads`: what stock loaders make of a folder whose bytes are all as its manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import Cli, document, one_line
from support.signed import sign
from support.tiny_models import PROMPT, planted_model

import swquant
from exporters.sidecar import SIDECAR
from swquant.checkpoints.manifest import MANIFEST

NORM = "model.layers.2.input_layernorm.weight"
CODES = "model.layers.2.mlp.up_proj"
Weights = dict[str, torch.Tensor]


def tampered(folder: Path, change: Callable[[Weights], dict[str, str]]) -> None:
    """Change the weights, and what lists them too. change: of the weights in place; returns old -> new name."""
    (path,) = folder.glob("model-*.safetensors")
    weights = load_file(path)
    renamed = change(weights)
    save_file(weights, path, {"format": "pt"})
    with safe_open(folder / SIDECAR, "pt") as file:
        metadata = file.metadata()
    patches = load_file(folder / SIDECAR)
    for old, new in renamed.items():
        patches = {name.replace(old, new): patch for name, patch in patches.items()}
    save_file(patches, folder / SIDECAR, metadata)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = dict.fromkeys(weights, path.name)
    index.write_text(json.dumps(table))
    tensors = json.loads((folder / MANIFEST).read_text())["tensors"]
    for name, record in [*tensors.items()]:
        new = renamed.get(name, name)
        tensors[new] = tensors.pop(name)
        if "shape" in record and new in weights:
            record["shape"] = list(weights[new].shape)
        if record["file"] == path.name:
            parts = [renamed.get(part, part) for part in record["sha256"]]
            record["sha256"] = {part: sha256(weights[part].view(torch.uint8).numpy()).hexdigest() for part in parts}
    sign(folder, {"tensors": tensors})


def another_name(weights: Weights) -> dict[str, str]:
    weights["model.layers.2.input_norm.weight"] = weights.pop(NORM)
    return {NORM: "model.layers.2.input_norm.weight"}


def another_module(weights: Weights) -> dict[str, str]:
    parts = {name: name.replace("up_proj", "upward_proj") for name in [*weights] if name.startswith(CODES)}
    for old, new in parts.items():
        weights[new] = weights.pop(old)
    return {**parts, f"{CODES}.weight": f"{CODES}.weight".replace("up_proj", "upward_proj")}


def another_shape(weights: Weights) -> dict[str, str]:
    weights[NORM] = torch.cat([weights[NORM], weights[NORM]])
    return {}


def another_kind(weights: Weights) -> dict[str, str]:
    weights[NORM] = weights[NORM].to(torch.int32)
    return {}


CHANGES = [
    (another_name, f"1 weights would be missing, first {NORM}"),
    (another_module, f"3 weights would be missing, first {CODES}.weight_packed"),
    (another_shape, f"{NORM} would have another shape"),
    (another_kind, f"{NORM} is stored as int32, which the model does not expect"),
]


def test_a_sound_checkpoint_loads(cli: Cli, compressed: Path) -> None:
    assert swquant.verify(compressed, loads=True) == []
    ran = cli("verify", compressed, "--loads")
    assert (ran.code, ran.err) == (0, "")
    first, second = ran.out.splitlines()
    assert first.endswith("every byte as written")
    stored = sum(len(load_file(path)) for path in compressed.glob("model-*.safetensors"))
    assert second.endswith(f" loads it: {stored} of {stored} weights meet, names, shapes and dtypes")
    said = document(cli("verify", compressed, "--loads", "--json"))
    assert said == {"ok": True, "problems": [], "loads": second}


@pytest.mark.parametrize(("change", "problem"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_what_was_signed_and_does_not_load_is_refused(
    cli: Cli, damaged: Path, change: Callable[[Weights], dict[str, str]], problem: str
) -> None:
    tampered(damaged, change)
    assert swquant.verify(damaged) == []
    (found,) = swquant.verify(damaged, loads=True)
    assert f"does not load it ({problem}); " in found
    ran = cli("verify", damaged, "--loads")
    assert one_line(ran) == f"refused: {found}"
    assert json.loads(cli("verify", damaged, "--loads", "--json").out) == {
        "ok": False,
        "problems": [found],
        "loads": None,
    }


def test_what_is_damaged_is_not_loaded(cli: Cli, damaged: Path) -> None:
    (damaged / "config.json").write_text("{}")
    assert one_line(cli("verify", damaged, "--loads")).startswith("damaged: config.json: ")


@pytest.mark.parametrize("architecture", ["gemma3", "mixtral", "phi3", "gpt_neox"])
def test_other_architectures_load(architecture: str, tmp_path: Path) -> None:
    source = planted_model(architecture, tmp_path / "model", torch.bfloat16).folder
    assert swquant.verify(swquant.compress(source, tmp_path / "out", prompt=PROMPT).path, loads=True) == []
