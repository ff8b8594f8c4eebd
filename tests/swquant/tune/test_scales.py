"""`tune --train scales`: other scales, the same codes, not a byte more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Cli, document
from support.tiny_models import PROMPT, TOKENS, sample_text, save_model, tiny_model

import swquant
from exporters.sidecar import SIDECAR
from swquant.tune.session import Session

Pair = tuple[Path, Path]
QUICK: dict[str, Any] = {"train": "scales", "steps": 16, "batch": 4, "window": 32, "texts": 40, "lr": "1e-2"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scales_are_trained_and_every_stock_loader_reads_them(pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    result = swquant.tune(checkpoint, tmp_path / "out", against=original, **QUICK)
    assert result is not None
    before, after = swquant.inspect(checkpoint), result.manifest
    record = after["tuned"]["tuned"]
    assert record["held_out_after"] < 0.95 * record["held_out_before"]
    assert (record["blocks"], record["bytes"]) == (0, 0)
    assert record["scales"] == sum(
        item["shape"][0] * item["shape"][1] // 32 for item in after["tensors"].values() if "bits" in item
    )
    assert after["totals"]["bits_per_quantized_weight"] == before["totals"]["bits_per_quantized_weight"]
    old, new = files(checkpoint), files(tmp_path / "out")
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {"model-00001-of-00001.safetensors", "swquant/manifest.json", "swquant/report.html"}
    assert all(len(new[name]) == len(old[name]) for name in changed if name.endswith(".safetensors"))
    assert new["swquant/report.html"].count(b"<figure>") == old["swquant/report.html"].count(b"<figure>") + 1
    for name, item in after["tensors"].items():
        parts = {part for part in item["sha256"] if item["sha256"][part] != before["tensors"][name]["sha256"][part]}
        assert parts <= {name.removesuffix("weight") + "weight_scale"}
    assert new[SIDECAR] == old[SIDECAR]
    assert swquant.verify(tmp_path / "out", loads=True) == []


def test_what_was_measured_is_what_loads(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in memory at the end is the one that is read from the files, bit for bit."""
    original, checkpoint = pair
    seen = []
    held_out = Session.held_out
    monkeypatch.setattr(Session, "held_out", lambda self: seen.append(self.model) or held_out(self))
    swquant.tune(checkpoint, tmp_path / "out", against=original, **{**QUICK, "steps": 3})
    with torch.no_grad():
        assert torch.equal(seen[-1](TOKENS).logits, swquant.load(tmp_path / "out", dtype=torch.float32)(TOKENS).logits)


@pytest.mark.slow
def test_both_are_better_than_either(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    common = ["--against", original, "--budget", "0.5bits", "--block", 16, "--lr", "3e-3"]
    common += [
        word
        for key, value in {**QUICK, "steps": 24}.items()
        if key not in ("train", "lr")
        for word in (f"--{key}", value)
    ]
    after = {}
    for train in ("blocks", "scales", "both"):
        shown = document(cli("tune", checkpoint, tmp_path / train, *common, "--train", train, "--json"))
        record = shown["manifest"]["tuned"]["tuned"]
        assert bool(record["blocks"]) == (train != "scales")
        assert bool(record.get("scales")) == (train != "blocks")
        after[train] = record["held_out_after"]
    assert after["both"] < min(after["blocks"], after["scales"])
    assert swquant.verify(tmp_path / "both") == []


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, checkpoint = pair
    options = {**QUICK, "train": "both", "steps": 6, "budget": "0.5bits", "block": 16}
    swquant.tune(checkpoint, tmp_path / "whole", against=original, **options)
    loss = Session.loss_of

    def broken(self: Session, step: int, part: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return loss(self, step, part)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "loss_of", broken)
        with pytest.raises(KeyboardInterrupt):
            swquant.tune(checkpoint, tmp_path / "out", against=original, **options)
    swquant.tune(checkpoint, tmp_path / "out", against=original, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("gpt2", {"block": "32"}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"block": "channel", "symmetric": False}, marks=pytest.mark.slow),
        pytest.param("llama", {"block": "32", "offsets": "float"}, marks=pytest.mark.slow),
        pytest.param("llama", {"block": "8x32", "dtype": "float16"}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"block": "32", "dense": ("k_proj",)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layouts_and_architectures(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Conv1D, rows, zero points, offsets, tiles, float16, dense tensors and experts beside."""
    original = save_model(tiny_model(architecture, num_hidden_layers=2), tmp_path / "m", torch.bfloat16)
    checkpoint = swquant.compress(original, tmp_path / "c", prompt=PROMPT, **options).path
    result = swquant.tune(checkpoint, tmp_path / "out", against=original, **{**QUICK, "steps": 8, "lr": "1e-3"})
    assert result is not None
    record = result.manifest["tuned"]["tuned"]
    assert record["held_out_after"] < record["held_out_before"]
    assert swquant.verify(tmp_path / "out", loads=True) == []


@pytest.mark.slow
def test_what_a_person_sees(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, checkpoint = pair
    (tmp_path / "text").write_text(sample_text(150))
    typed = ["tune", checkpoint, tmp_path / "out", "--against", original, "--eval-text", tmp_path / "text"]
    typed += [word for key, value in {**QUICK, "steps": 2, "texts": 8}.items() for word in (f"--{key}", value)]
    plan = document(cli(*typed, "--dry-run", "--json"))
    assert (plan["blocks"], plan["bytes"]) == (0, 0)
    assert plan["scales"] == plan["parameters"] > 0
    ran = cli(*typed)
    shown = " ".join(ran.out.split())
    assert ran.code == 0, ran.err
    for part in ("scales and offsets of 21 weights of c: not a byte more", "tuned: the scales were trained, no blocks"):
        assert part in shown
    assert "tuned: the scales were trained" in cli("inspect", tmp_path / "out").out
    second = cli("tune", tmp_path / "out", tmp_path / "two", *typed[3:])
    assert second.code == 0, second.err
    assert list(swquant.inspect(tmp_path / "two")["tuned"]) == ["tuned", "tuned-2"]


def test_without_rounded_weights_there_is_nothing_to_train(cli: Cli, pair: Pair, tmp_path: Path) -> None:
    original, _ = pair
    swquant.compress(original, tmp_path / "c", prompt=PROMPT, dense=("mlp",), allow_dense=True)
    ran = cli("tune", tmp_path / "c", tmp_path / "out", "--against", original, "--train", "scales", "--from", "mlp")
    assert ran.code == 1
    assert "no rounded weight with scales to train with --from mlp; use all" in ran.err
