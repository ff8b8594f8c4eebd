"""What is said of vLLM before it is asked (`make test-vllm` asks it): bits, groups, and layers that it fuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import Cli
from support.tiny_models import PROMPT, save_model, tiny_model

import swquant
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.budget import fused_groups
from swquant.compress.loaders import fused_layer, loader_table
from swquant.compress.options import CompressOptions
from swquant.compress.pipeline import prepare
from swquant.detect.pipeline import find_super_weights

HUMMING = "on CUDA with Humming's kernels only, by its sources: others take "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(tiny_model(name), root / name) for name in ("llama", "mixtral")}


def verdict(folder: Path, **options: object) -> str:
    with open_checkpoint(folder) as checkpoint:
        known = {"block": "32", "prompt": PROMPT, "preset": "fast"}
        return loader_table(prepare(checkpoint, CompressOptions(**{**known, **options})).plan)["vLLM"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "yes; ignores the sidecar"),
        ({"block": "channel"}, "yes; ignores the sidecar"),
        ({"symmetric": False}, "yes; ignores the sidecar"),
        ({"bits": 8}, "yes on CUDA, by its sources; not on a CPU, where its kernel takes 4 bits, not 8"),
        ({"bits": 8, "symmetric": False}, HUMMING + "no zero points of 8 bits"),
        ({"bits": 3}, HUMMING + "4 and 8 bits, not 3"),
        ({"bits": 8, "block": "16"}, HUMMING + "groups of 32, 64, 128 or a channel, not 16"),
        ({"block": "16"}, "yes on a CPU; on CUDA, by its sources, Marlin's kernels take groups of 32, 64, 128 or a channel, not 16"),
        ({"bits": 8, "activations": "int8", "block": "channel"}, "yes, with integer products; ignores the sidecar"),
        ({"activations": "int8"}, "yes; ignores the sidecar (swquant-vllm restores it), leaves activations in float"),
        ({"dense": ("o_proj", "down_proj")}, "yes; ignores the sidecar"),  # which nothing is fused with
    ],
)  # fmt: skip
def test_what_vllm_does_with_a_scheme(folders: dict[str, Path], options: dict, said: str) -> None:
    assert verdict(folders["llama"], **options).startswith(said)


def test_experts_need_cuda(folders: dict[str, Path]) -> None:
    assert "not on a CPU, where it has no kernel for packed experts" in verdict(folders["mixtral"])


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        ("layers.1.self_attn.k_proj", "model.layers.1.self_attn.k_proj is dense and q_proj int4 group 32 symmetric"),
        ("layers.1.self_attn.v_proj", "model.layers.1.self_attn.k_proj is int4 group 32 symmetric and v_proj dense"),
        ("up_proj", "model.layers.0.mlp.gate_proj is int4 group 32 symmetric and up_proj dense"),
    ],
)
def test_weights_of_one_layer_stored_unlike_are_named(folders: dict[str, Path], dense: str, said: str) -> None:
    assert (
        verdict(folders["llama"], dense=(dense,))
        == f"no: it fuses layers whose weights must be stored alike, and {said}"
    )


def test_compress_ends_with_the_loaders_that_take_it_nowhere_or_not_everywhere(
    folders: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    common = ("--block", "32", "--preset", "fast", "--prompt", PROMPT)
    ran = cli("compress", folders["llama"], tmp_path / "unlike", "--dense", "0.self_attn.k_proj", *common)
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if line.startswith("vLLM: no: it fuses layers")]
    assert "vLLM" not in cli("compress", folders["llama"], tmp_path / "alike", *common).out
    shown = " ".join(cli("inspect", tmp_path / "unlike").out.split())
    assert "no: it fuses layers whose weights must be stored alike" in shown


def test_what_vllm_fuses_has_equal_bits_where_layers_read_no_norm(tmp_path: Path) -> None:
    """OLMo 2 has its norms behind the layers, so no norm tells which weights read the same input."""
    folder = save_model(tiny_model("olmo2"), tmp_path / "olmo2")
    with open_checkpoint(folder) as checkpoint:
        found = find_super_weights(checkpoint, PROMPT)
        groups = {name: group for group in fused_groups(found, list(found.architecture.weights)) for name in group}
    query = "model.layers.1.self_attn.q_proj.weight"
    record = found.record(query)
    assert record is not None
    assert record.norm == ""
    assert set(groups[query]) == {query.replace("q_proj", f"{part}_proj") for part in "qkv"}
    assert groups["model.layers.1.mlp.up_proj.weight"] == groups["model.layers.1.mlp.gate_proj.weight"]
    assert len(groups["model.layers.1.mlp.down_proj.weight"]) == 1


def test_a_budget_makes_fused_weights_alike(tmp_path: Path) -> None:
    folder = save_model(tiny_model("olmo2"), tmp_path / "olmo2")
    result = swquant.compress(folder, tmp_path / "out", bits_budget=5.25, block="16", prompt=PROMPT)
    bits: dict[str, set[int]] = {}
    for name, record in result.manifest["tensors"].items():
        if "bits" in record:
            bits.setdefault(fused_layer(name), set()).add(record["bits"])
    assert all(len(numbers) == 1 for numbers in bits.values())
    assert len(set.union(*bits.values())) > 1
    assert "fuses" not in swquant.inspect(result.path)["loaders"]["vLLM"]
