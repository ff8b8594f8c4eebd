"""`--preset best`: text of the model's own, the same every time, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import PROMPT, planted_model

import swquant


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mixtral"])
def test_best_makes_a_sound_checkpoint(architecture: str, tmp_path: Path) -> None:
    planted = planted_model(architecture, tmp_path / "model")
    manifest = swquant.compress(planted.folder, tmp_path / "best", prompt=PROMPT, preset="best", bits=4).manifest
    assert swquant.verify(tmp_path / "best") == []
    assert manifest["options"]["preset"] == "best"
    restored = swquant.load(tmp_path / "best").state_dict()
    if planted.name in restored:
        assert float(restored[planted.name][planted.row, planted.col]) == pytest.approx(60, rel=0.01)


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    planted = planted_model("llama", tmp_path / "model")

    def hashes(out: str, seed: int) -> dict:
        manifest = swquant.compress(planted.folder, tmp_path / out, prompt=PROMPT, preset="best", seed=seed).manifest
        return {name: record["sha256"] for name, record in manifest["tensors"].items()}

    first = hashes("a", 0)
    assert hashes("b", 0) == first
    assert hashes("c", 1) != first


def test_more_texts_are_other_texts(tmp_path: Path) -> None:
    planted = planted_model("llama", tmp_path / "model")
    codes = []
    for texts in (2, 3):
        out = swquant.compress(planted.folder, tmp_path / str(texts), prompt=PROMPT, preset="best", texts=texts)
        assert out.manifest["options"]["texts"] == texts
        codes.append({name: record["sha256"] for name, record in out.manifest["tensors"].items()})
    assert codes[0] != codes[1]


def test_a_super_weight_keeps_its_own_code_without_a_sidecar(tmp_path: Path) -> None:
    planted = planted_model("llama", tmp_path / "model")
    manifest = swquant.compress(
        planted.folder, tmp_path / "best", prompt=PROMPT, preset="best", block="16", restore=False
    ).manifest
    (point,) = manifest["tensors"][planted.name]["super_weights"]
    assert point["without_sidecar"] == pytest.approx(point["value"], rel=1 / 256)
