"""Trained blocks in an exported graph: the tuned checkpoint's answers, on our runtime and on a stock one."""

from pathlib import Path
from typing import Any

import pytest
from support.exported import check_parity, compressed_model
from support.patched import planned, record

import swquant
from exporters import ops
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.models.architecture import describe
from swquant.training.patched import write_patched

pytest.importorskip("onnxruntime")


def tuned(checkpoint: Path, out: Path, *, side: int = 16) -> Path:
    """With two blocks on every linear layer, and a second set of another side on some."""
    with CompressedCheckpoint(checkpoint) as opened:
        blocks = planned(opened, describe(opened).weights, side=side)
        write_patched(opened, out.with_name("one"), "tuned", blocks, record(blocks))
    with CompressedCheckpoint(out.with_name("one")) as opened:
        more = planned(opened, list(describe(opened).weights)[:3], side=8)
        write_patched(opened, out, "more", more, record(more))
    return out


@pytest.mark.parametrize(
    ("graph", "side"), [("dynamo", 24), *(pytest.param("genai", side, marks=pytest.mark.slow) for side in (16, 24))]
)
def test_it_answers_as_the_tuned_checkpoint(checkpoint: Path, tmp_path: Path, graph: str, side: int) -> None:
    """side 24 divides nothing: blocks stick out, and straddle what the builder fuses."""
    folder = tuned(checkpoint, tmp_path / "tuned", side=side)
    result = swquant.export(folder, tmp_path / "onnx", graph=graph)
    check_parity(folder, tmp_path / "onnx", sequences=1 if graph == "genai" else 2)
    text = " ".join(f"t{index}" for index in range(3, 90))
    own, base = (swquant.evaluate(tmp_path / "onnx", text, path).kl for path in (folder, checkpoint))
    assert own is not None
    assert base is not None
    assert own < 1e-6
    assert base > 1e-3
    counts = [item.get("trained_blocks", 0) for item in result.manifest["weights"].values()]
    assert sorted({*counts}) in ([2, 4], [0, 2, 4])
    assert result.manifest["check"]["largest_difference"] < result.manifest["check"]["tolerance"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"accuracy_level": 4}, {"lm_head_bits": 8}], ids=str)
def test_with_other_arithmetic(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tuned(checkpoint, tmp_path / "tuned")
    swquant.export(folder, tmp_path / "onnx", **options)
    text = " ".join(f"t{index}" for index in range(3, 90))
    own, base = (swquant.evaluate(tmp_path / "onnx", text, path).kl for path in (folder, checkpoint))
    assert own is not None
    assert base is not None
    assert own < 0.1 * base


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["phi3", "gemma3", "opt"])
def test_other_families(architecture: str, tmp_path: Path) -> None:
    """Fused projections, tied heads, biases."""
    folder = tuned(compressed_model(architecture, tmp_path), tmp_path / "tuned", side=24)
    check_parity(folder, swquant.export(folder, tmp_path / "onnx").path)


@pytest.mark.slow
def test_a_stock_runtime_gives_the_same(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tuned(checkpoint, tmp_path / "tuned")
    swquant.export(folder, tmp_path / "onnx")
    for module in (ops, *(__import__(name, fromlist=["x"]) for name in ("swquant.models.runtime", "swquant.ort"))):
        if hasattr(module, "library_path"):
            monkeypatch.setattr(module, "library_path", lambda: None)
    check_parity(folder, tmp_path / "onnx")
