"""`merge`: what was trained becomes codes, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, document
from support.patched import planned, record
from support.tiny_models import PROMPT, TOKENS, Planted, planted_model, sample_text, save_model, tiny_model

import swquant
from exporters.sidecar import OUTLIERS, SIDECAR
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.detect import texts as own_texts
from swquant.models import devices
from swquant.models.architecture import describe
from swquant.training.patched import write_patched


def tuned_of(model: Path, folder: Path, names: Any = None, *, scale: float = 0.05, **options: Any) -> Path:
    """A checkpoint with random blocks on every linear layer of the last decoder layer, or on those with such names."""
    swquant.compress(model, folder / "c", prompt=PROMPT, **options)
    with CompressedCheckpoint(folder / "c") as checkpoint:
        weights = describe(checkpoint).weights
        last = max(weight.layer for weight in weights.values())
        chosen = [name for name, weight in weights.items() if (names or "") in name and weight.layer == last]
        blocks = planned(checkpoint, chosen, scale=scale)
        write_patched(checkpoint, folder / "tuned", "tuned", blocks, record(blocks))
    return folder / "tuned"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama at 4 bits, with blocks in its last layer. Do not change it."""
    folder = tmp_path_factory.mktemp("merge")
    model = save_model(tiny_model("llama", num_hidden_layers=2), folder / "model", torch.bfloat16)
    return tuned_of(model, folder, block="32", outliers=0.01)


def logits(path: Path, *, restore: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return swquant.load(path, dtype=torch.float32, restore=restore)(TOKENS).logits


def test_blocks_become_codes_and_nothing_else_changes(cli: Cli, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(sample_text(120))
    shown = document(cli("merge", tuned, tmp_path / "out", "--texts", 4, "--eval-text", tmp_path / "text", "--json"))
    old, new = swquant.inspect(tuned), swquant.inspect(tmp_path / "out")
    assert swquant.verify(tmp_path / "out", loads=True) == []
    assert shown["manifest"] == new
    assert "tuned" not in new
    (said,) = new["merged"]
    assert (said["sets"], said["base"], said["tensors"]) == (["tuned"], old["digest"], 7)
    assert said["kl_merged"] < 0.5 * said["kl_without"]
    for name, item in new["tensors"].items():
        was = old["tensors"][name]
        assert "blocks" not in item
        if "blocks" in was:
            different = {
                part.rpartition("_")[2] for part in item["sha256"] if item["sha256"][part] != was["sha256"][part]
            }
            assert different == {"packed"}  # scales stay
            assert item["outliers"] == was["outliers"]
        else:
            assert item == was
    changed = {name for name in old["files"] if old["files"][name] != new["files"].get(name)}
    assert all(name.endswith(".safetensors") or name == "README.md" for name in changed)
    without, with_them, merged = shown["evaluation"]["kl"]
    assert with_them < 1e-6
    assert merged < 0.5 * without
    before = swquant.inspect(tuned.parent / "c")["totals"]["bits_per_quantized_weight"]
    assert new["totals"]["bits_per_quantized_weight"] == pytest.approx(before, abs=1e-4)


@pytest.mark.slow
def test_another_device_merges_as_well(
    tuned: Path, tmp_path: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_texts, "LENGTH", 24)
    here = swquant.merge(tuned, tmp_path / "here", texts=2, device="cpu").record
    monkeypatch.setattr(devices, "device_for", lambda _: gpu)
    there = swquant.merge(tuned, tmp_path / "there", texts=2).record
    assert here is not None
    assert there is not None
    assert there["kl_merged"] == pytest.approx(here["kl_merged"], rel=0.1)
    assert swquant.verify(tmp_path / "there") == []


def test_feedback_keeps_more_than_the_nearest_codes(tuned: Path, tmp_path: Path) -> None:
    goal = logits(tuned)
    far = {}
    for texts in (0, 8):
        swquant.merge(tuned, tmp_path / str(texts), texts=texts)
        far[texts] = float((logits(tmp_path / str(texts)) - goal).square().mean())
    assert far[8] < far[0]


def test_with_the_outliers_merged_nothing_is_left_to_restore(tuned: Path, tmp_path: Path) -> None:
    result = swquant.merge(tuned, tmp_path / "out", points=True, texts=4)
    assert SIDECAR not in result.manifest["files"]
    assert not (tmp_path / "out" / SIDECAR).exists()
    assert swquant.verify(tmp_path / "out", loads=True) == []
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "out", restore=False))
    assert result.record["tensors"] == 14  # all that had outliers
    assert all(not item.get("outliers") for item in result.manifest["tensors"].values())


@pytest.mark.slow
def test_outliers_that_stay_have_moved_with_their_block(tuned: Path, tmp_path: Path) -> None:
    swquant.merge(tuned, tmp_path / "out", texts=0)
    moved = 0
    with CompressedCheckpoint(tuned) as before, CompressedCheckpoint(tmp_path / "out") as after:
        for name in before.quantized_names:
            (points,) = after.patches(name)
            rows, cols = points.rows.long(), points.cols.long()
            assert torch.equal(points.values, before.read(name)[rows, cols])
            moved += int((points.values != before.patches(name)[0].values).sum())
        assert before.sets == (OUTLIERS, "tuned")
        assert after.sets == (OUTLIERS,)
    assert moved


@pytest.mark.slow
def test_one_set_of_several(tuned: Path, tmp_path: Path) -> None:
    with CompressedCheckpoint(tuned) as checkpoint:
        blocks = planned(checkpoint, list(checkpoint.quantized_names)[:3], scale=0.02)
        write_patched(checkpoint, tmp_path / "two", "more", blocks, record(blocks))
    result = swquant.merge(tmp_path / "two", tmp_path / "out", set_=("more",), texts=0)
    assert list(result.manifest["tuned"]) == ["tuned"]
    assert result.record["tensors"] == 3
    near, far = (float((logits(path) - logits(tmp_path / "two")).square().mean()) for path in (tmp_path / "out", tuned))
    assert near < far


@pytest.mark.slow
def test_a_super_weight_is_still_there_for_those_who_ignore_the_sidecar(bf16_llama: Planted, tmp_path: Path) -> None:
    (folder := tmp_path / "f").mkdir()
    swquant.compress(bf16_llama.folder, folder / "c", prompt=PROMPT)
    with CompressedCheckpoint(folder / "c") as checkpoint:
        blocks = planned(checkpoint, [bf16_llama.name])
        write_patched(checkpoint, folder / "tuned", "tuned", blocks, record(blocks))
    result = swquant.merge(folder / "tuned", tmp_path / "out", texts=2)
    (point,) = result.manifest["tensors"][bf16_llama.name]["super_weights"]
    assert point["without_sidecar"] == pytest.approx(point["value"], rel=0.05)
    with CompressedCheckpoint(tmp_path / "out", restored=False) as bare:
        assert float(bare.read(bf16_llama.name)[point["row"], point["col"]]) == pytest.approx(
            point["without_sidecar"], rel=0.01
        )


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("gpt2", {"block": "32"}, marks=pytest.mark.slow),
        pytest.param("phi3", {"block": "32", "symmetric": False}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"block": "32", "bits": 3}, marks=pytest.mark.slow),
        pytest.param("llama", {"block": "8x32"}, marks=pytest.mark.slow),
        pytest.param("llama", {"block": "32", "offsets": "float"}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"dense": ("v_proj",)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layouts_and_architectures(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Conv1D, zero points, experts beside, tiles, offsets, dense tensors with blocks."""
    planted_model(architecture, tmp_path / "model")
    only = "self_attn" if architecture == "mixtral" else None
    tuned = tuned_of(tmp_path / "model", tmp_path, only, scale=0.2, **options)
    result = swquant.merge(tuned, tmp_path / "out", texts=2)
    # Stock transformers takes no packed zero points of phi3's fused layers, merged or not.
    assert swquant.verify(tmp_path / "out", loads=architecture != "phi3") == []
    assert result.record["kl_merged"] < result.record["kl_without"]
    with CompressedCheckpoint(tmp_path / "out") as checkpoint, CompressedCheckpoint(tuned) as before:
        for name in before.tensors:
            near = float((checkpoint.read(name).float() - before.read(name).float()).abs().max())
            if "dense" in checkpoint.manifest["tensors"][name]:
                assert near == 0.0


def test_what_cannot_be_merged_is_one_line(cli: Cli, tuned: Path, bf16_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for typed, problem in {
        (bf16_llama.folder, out): "not a compressed checkpoint; merge bakes patches into its codes",
        (tuned.parent / "c", out): "holds no blocks that were trained, so there is nothing to merge; --points merges",
        (tuned, out, "--set", "other"): "--set other: tuned has the sets tuned",
        (tuned, out, "--texts", -1): "--texts -1 is outside 0 to 4096",
        (tuned, tuned): "holds the source",
        (tuned, tmp_path): "exists already",
        (tmp_path / "none", out): "no such folder",
        (tuned, out, "--eval-text", tmp_path / "none"): "cannot be read",
    }.items():
        ran = cli("merge", *typed)
        assert ran.code == 1
        assert len(ran.err.strip().splitlines()) == 1, ran.err
        assert problem in ran.err
        assert not out.exists()


@pytest.mark.slow
def test_what_a_person_sees(cli: Cli, tuned: Path, tmp_path: Path) -> None:
    ran = cli("merge", tuned, tmp_path / "out", "--texts", 2)
    shown = " ".join(ran.out.split())
    assert "tuned became part of the codes of 7 tensors" in shown
    assert "for those who ignored the sidecar" in shown
