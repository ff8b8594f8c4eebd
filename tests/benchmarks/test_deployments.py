"""The table of runtimes is that of the results, and what a reader hands over is what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.paths import PROJECT
from support.tiny_models import TOKENS, Planted
from transformers import AutoModelForCausalLM

import swquant


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import deployments

    return deployments


def test_the_table_of_the_documentation_is_that_of_the_results(deployments: ModuleType) -> None:
    recorded = json.loads((PROJECT / "benchmarks/results/deployments.json").read_text())
    said = (PROJECT / "docs/deployment.md").read_text()
    assert "\n".join(deployments.table(recorded["results"])) in said
    short = "\n".join(deployments.short_table(recorded["results"]["smollm2"]))
    assert short in (PROJECT / "README.md").read_text()


def test_tokens_are_counted_until_one_differs(deployments: ModuleType) -> None:
    assert deployments.same([1, 2, 3], [1, 2, 3]) == 3
    assert deployments.same([1, 2, 3], [1, 5, 3]) == 1
    assert deployments.same([], []) == 0


def test_a_padded_head_changes_nothing(deployments: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(6, 10), torch.randn(6, 10)
    logits.numpy().tofile(tmp_path / "original")
    torch.cat([other, torch.full((6, 2), -5.0)], 1).numpy().tofile(tmp_path / "found")
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert deployments.divergence(tmp_path / "original", tmp_path / "found", 10) == pytest.approx(float(expected), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1, 2, 8, 9])  # those that need no environment but this one
def test_a_reader_says_what_the_model_computes(
    deployments: ModuleType, planted_llama: Planted, row: int, tmp_path: Path
) -> None:
    asked = deployments.ROWS[row]
    given = {"format": "onnx", "block": "32"} if asked.file == "ONNX" else {}
    swquant.compress(planted_llama.folder, deployments.place_of(tmp_path, asked.file), prompt="t1 t2 t3", **given)
    ids = TOKENS[0].tolist()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(planted_llama.folder)(TOKENS[:1]).logits[0].float()
    logits.numpy().tofile(tmp_path / "original.f32")
    (tmp_path / "asked.json").write_text(
        json.dumps({"windows": [ids], "prompt": ids[:4], "vocabulary": logits.shape[1]})
    )
    found = deployments.run(asked, tmp_path)
    assert len(found["greedy"]) == deployments.TOKENS
    assert found["rate"] > 0
    assert 0 < found["kl"] < 0.05
