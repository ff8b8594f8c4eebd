"""`--preset best`: text of the model's own, the same every time, and what comes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.tiny_models import PROMPT, planted_model, save_model, save_tokenizer, tiny_model

import swquant
from swquant.compress.pipeline import Compressed


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


def test_layers_follow_each_other_however_the_file_orders_them(tmp_path: Path) -> None:
    """Files are sorted by name, so that layer 10 comes before layer 2; the own text meets them in turn."""
    folder = save_model(tiny_model("llama", num_hidden_layers=12), tmp_path / "model")
    number = re.compile(r"layers\.(\d+)\.")

    def layers(preset: str) -> list[int]:
        plan = swquant.plan(folder, prompt=PROMPT, preset=preset).prepared.plan
        return [int(match[1]) for tensor in plan.tensors if (match := number.search(tensor.name))]

    assert layers("balanced") != sorted(layers("balanced"))
    assert layers("best") == sorted(layers("balanced"))


def test_text_is_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    """OPT looks positions up in a table of so many rows."""
    folder = save_model(tiny_model("opt", max_position_embeddings=40), tmp_path / "model")
    swquant.compress(folder, tmp_path / "best", prompt=PROMPT, preset="best", texts=2)
    assert swquant.verify(tmp_path / "best") == []


def hashes(out: Compressed) -> dict[str, str]:
    return {name: record["sha256"] for name, record in out.manifest["tensors"].items()}


def test_another_model_may_write_the_text(tmp_path: Path) -> None:
    folder = save_model(tiny_model("llama", num_hidden_layers=2), tmp_path / "model")
    smaller = save_model(tiny_model("llama", num_hidden_layers=1), tmp_path / "smaller")
    best = {"prompt": PROMPT, "preset": "best", "texts": 2}
    own = swquant.compress(folder, tmp_path / "own", **best)
    itself = swquant.compress(folder, tmp_path / "itself", text_from=str(folder), **best)
    other = swquant.compress(folder, tmp_path / "other", text_from=str(smaller), **best)
    assert hashes(itself) == hashes(own) != hashes(other)
    assert swquant.inspect(other.path)["options"]["text_from"] == str(smaller)
    fast = swquant.compress(folder, tmp_path / "fast", prompt=PROMPT, preset="fast").path
    from_itself_compressed = swquant.compress(folder, tmp_path / "packed", text_from=str(fast), **best)
    assert hashes(from_itself_compressed) != hashes(own)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({}, {"word": 5}, "its tokenizer is not that of model"),
        ({"vocab_size": 130}, {}, "writes 130 tokens in texts of 128, model reads 128"),
        ({"max_position_embeddings": 64}, {}, "in texts of 64"),
    ],
)
def test_a_writer_that_does_not_fit_is_refused_before_the_work(
    changes: dict, words: dict, message: str, tmp_path: Path
) -> None:
    folder = save_model(tiny_model("llama", num_hidden_layers=2), tmp_path / "model")
    other = save_model(tiny_model("llama", num_hidden_layers=2, **changes), tmp_path / "other")
    save_tokenizer(other, words)
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.plan(folder, prompt=PROMPT, preset="best", text_from=str(other))
    with pytest.raises(swquant.SwquantError, match="no such folder"):
        swquant.plan(folder, prompt=PROMPT, preset="best", text_from=str(tmp_path / "nothing"))
