"""A study finds what was planted, nothing in the control, and the numbers of `swquant eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.study_world import PROMPT, STOPWORDS, WINDOW, WINDOWS, World, rows, section, without_super_weight

import swquant
from swquant.study.pipeline import Study


def test_identify_marks_the_planted_scalar(study: Study, planted: World) -> None:
    assert section(study, "identify")["agrees"] is True
    (found,) = rows(study, "identify", "super-weights")
    assert (found["role"], found["layer"], found["[row, col]"], found["value"]) == ("creator", 1, "[37, 101]", 60.0)
    layers = rows(study, "identify", "layers")
    assert [row["layer"] for row in layers] == list(range(6))
    assert max(layers, key=lambda row: row["largest |output|"])["layer"] == 1
    marks = next(item for item in study.sections if item.name == "identify").charts[0].marks
    assert [(mark.x, mark.kept, mark.label) for mark in marks] == [(1, True, "1: [37, 101]")]


def test_importance_shows_that_one_scalar_outweighs_many(study: Study) -> None:
    assert section(study, "importance")["agrees"] is True
    table = {row["model"]: row for row in rows(study, "importance", "importance")}
    loss = {name: row["excess loss"] and row["excess loss"]["value"] for name, row in table.items()}
    assert loss["original"] is None
    assert loss["super weights pruned"] > 1
    assert abs(loss["22 largest other weights pruned"]) < 0.5  # one in 10,000
    assert table["super weights pruned"]["agreement"]["value"] < 0.5
    for row in table.values():
        assert row["perplexity"]["low"] <= row["perplexity"]["value"] <= row["perplexity"]["high"]


def test_persistence_finds_the_channel_on_every_prompt(study: Study) -> None:
    assert section(study, "persistence")["agrees"] is True
    prompts = rows(study, "persistence", "prompts")
    assert len(prompts) == 15
    assert {(row["position"], row["token"]) for row in prompts} == {(0, "'w005'")}
    assert all(row["super weights pruned"] < 0.01 * row["original"] for row in prompts)
    magnitudes = [row["original"] for row in rows(study, "persistence", "persistence")]
    assert max(magnitudes[:2]) < 100 < 10_000 < min(magnitudes[2:])  # after layer 1, entry 2


def test_stopwords_gain_when_the_scalar_is_gone(study: Study) -> None:
    assert section(study, "stopwords")["agrees"] is True
    table = rows(study, "stopwords", "stopwords")
    assert table[0]["token"] == "all stopwords"
    assert table[0]["times"] > 2
    assert {row["token"].strip("'") for row in table[1:]} >= set(STOPWORDS)


def test_amplification_says_that_nothing_beats_the_model_that_wrote_the_text(study: Study) -> None:
    found = section(study, "amplification")
    assert found["agrees"] is False
    table = {row["factor"]: row for row in rows(study, "amplification", "amplification")}
    assert sorted(table) == [0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0]
    assert table[0.0]["perplexity"]["value"] > 5 * table[1.0]["perplexity"]["value"]
    assert table[1.0]["agreement"]["value"] == 1.0
    # The same measurement, not a second one.
    assert table[0.0]["perplexity"] == rows(study, "importance", "importance")[1]["perplexity"]


def test_restoring_mends_what_clipping_breaks(study: Study) -> None:
    table = {(row["block"], row["method"]): row for row in rows(study, "block-size", "block-size")}
    assert {block for block, _ in table} == {"flat:32", "flat:128", "flat:512", "flat:4096", "tensor"}
    for block in ("flat:4096", "tensor"):
        kl = {method: table[block, method]["KL divergence"]["value"] for method in ("clipped", "restored")}
        assert kl["restored"] < 0.5 * kl["clipped"]
    bits = [table[block, "plain"]["bits per weight"] for block in ("flat:32", "flat:128", "flat:512")]
    assert bits == [4 + 32 / 32, 4 + 32 / 128, 4 + 32 / 512]  # scales are float32 like the weights


def test_keeping_what_is_massive_mends_one_scale_for_a_tensor(study: Study) -> None:
    table = {(row["scale"], row["kept"]): row["KL divergence"] for row in rows(study, "activations", "activations")}
    plain, scalar, channels = (table["per tensor", kept]["value"] for kept in ("nothing", "scalar", "channels"))
    assert channels < scalar < plain
    assert channels < 0.2 * plain


def test_the_control_shows_nothing(of_control: Study) -> None:
    assert "No super weight was found" in section(of_control, "identify")["finding"]
    assert {item["name"]: item["agrees"] for item in of_control.record["sections"]} == {
        "identify": False, "importance": None, "persistence": None, "stopwords": None, "amplification": None,
        "block-size": None, "activations": None,
    }  # fmt: skip
    for name in ("persistence", "stopwords", "amplification"):
        assert section(of_control, name)["finding"].startswith("Not shown: ")
    methods = {row["method"] for row in rows(of_control, "block-size", "block-size")}
    assert methods == {"plain"}
    page = (of_control.path / "report.html").read_text()
    assert page.count("<svg") == 6  # two of identify, importance, two of block size, activations
    assert "no super weight" in page


def assert_equal(row: dict[str, Any], evaluation: Any) -> None:
    assert row["perplexity"]["value"] == pytest.approx(evaluation.perplexity, rel=1e-5)
    assert row["KL divergence"]["value"] == pytest.approx(evaluation.kl, rel=1e-3, abs=1e-7)
    assert row["agreement"]["value"] == pytest.approx(evaluation.top1, abs=1e-9)


def test_pruning_equals_eval_of_the_pruned_model(study: Study, planted: World, tmp_path: Path) -> None:
    pruned = without_super_weight(planted, tmp_path / "pruned")
    text = planted.text.read_text()
    result = swquant.evaluate(pruned, text, planted.folder, window=WINDOW, limit=WINDOWS)
    original, row, *_ = rows(study, "importance", "importance")
    assert original["perplexity"]["value"] == pytest.approx(result.original_perplexity, rel=1e-5)
    assert_equal(row, result)
    assert study.record["text"]["tokens"] == result.tokens


def test_rounding_equals_eval_of_the_compressed_model(study: Study, planted: World, tmp_path: Path) -> None:
    small = swquant.compress(
        planted.folder, tmp_path / "small", block="flat:32", refine="none", restore=False, prompt=PROMPT
    ).path
    result = swquant.evaluate(small, planted.text.read_text(), planted.folder, window=WINDOW, limit=WINDOWS)
    assert_equal(rows(study, "block-size", "block-size")[0], result)
