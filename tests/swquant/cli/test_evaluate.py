"""`swquant eval` and `generate`: the numbers that Python users get, a gate, and texts that cannot be read."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, Planted, save_model, tiny_model

import swquant


def test_eval_json_is_what_evaluate_returns(cli: Cli, compressed: Path, bf16_llama: Planted, text: Path) -> None:
    words = (
        "eval",
        compressed,
        "--text",
        text,
        "--against",
        bf16_llama.folder,
        "--window",
        "20",
        "--limit",
        "2",
        "--json",
    )
    expected = swquant.evaluate(compressed, text.read_text(), bf16_llama.folder, window=20, limit=2)
    assert document(cli(*words)) == asdict(expected)
    assert 0 < document(cli(*words))["accepted"] < 1
    expected = swquant.evaluate(compressed, text.read_text(), bf16_llama.folder, window=20, limit=2, restore=False)
    assert document(cli(*words, "--no-restore")) == asdict(expected)


def test_eval_shows_four_digits(cli: Cli, compressed: Path, bf16_llama: Planted, text: Path) -> None:
    expected = swquant.evaluate(compressed, text.read_text(), bf16_llama.folder)
    ran = cli("eval", compressed, "--text", text, "--against", bf16_llama.folder)
    assert re.search(rf"perplexity\s+{expected.perplexity:.4f}\s", ran.out)
    assert re.search(rf"perplexity of the original\s+{expected.original_perplexity:.4f}\s", ran.out)
    assert f"{expected.kl:.5f}" in ran.out
    assert f"{expected.top1:.2%}" in ran.out
    assert re.search(rf"expected acceptance rate\s+{expected.accepted:.2%}\s", ran.out)
    assert "Tensors that lose most" in ran.out
    assert "Tensors that lose most" not in cli("eval", compressed, "--text", text).out


def test_eval_is_a_gate(cli: Cli, compressed: Path, bf16_llama: Planted, text: Path) -> None:
    words = ("eval", compressed, "--text", text, "--against", bf16_llama.folder)
    assert cli(*words, "--max-kl", "1", "--max-perplexity", "1e6").code == 0
    ran = cli(*words, "--max-kl", "1e-9")
    assert ran.code == 1
    assert re.search(r"error: KL divergence 0\.\d+ is above the limit 1e-09$", ran.err.strip())
    ran = cli(*words, "--max-perplexity", "1.5", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["perplexity"] > 1.5
    assert "is above the limit 1.5" in ran.err


def test_max_kl_needs_something_to_compare_with(cli: Cli, compressed: Path, text: Path) -> None:
    assert "--against" in one_line(cli("eval", compressed, "--text", text, "--max-kl", "1"))


@pytest.mark.parametrize(
    ("name", "message"), [("no.txt", "cannot be read"), (".", "cannot be read"), ("latin.txt", "not UTF-8")]
)
def test_a_text_that_cannot_be_read_is_one_line(
    cli: Cli, compressed: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert message in one_line(cli("eval", compressed, "--text", tmp_path / name))


def test_eval_counts_tokens_not_bytes(cli: Cli, compressed: Path, text: Path) -> None:
    lines = cli("eval", compressed, "--text", text, "--window", "9").err.splitlines()
    assert lines[0] == "Loading out"
    assert all(
        re.fullmatch(r"Evaluating \d+ %, \d+ tokens of 80 tokens, [\d,]+ tokens/s, \d+ s left", x) for x in lines[1:]
    )


def test_a_destroyed_model_is_still_json(cli: Cli, tmp_path: Path, text: Path) -> None:
    """A perplexity beyond every float has no number in JSON; the command must not print `Infinity`."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    folder = save_model(model, tmp_path / "wild")
    ran = cli("eval", folder, "--text", text, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out, parse_constant=pytest.fail)["perplexity"] is None
    assert re.search(r"perplexity\s+inf\s", cli("eval", folder, "--text", text).out)
    assert "perplexity inf is above" in cli("eval", folder, "--text", text, "--max-perplexity", "100").err


def test_generate_prints_the_text_and_nothing_else(cli: Cli, compressed: Path) -> None:
    expected = swquant.generate(compressed, PROMPT, tokens=30)
    assert cli("generate", compressed, PROMPT, "--tokens", "30").out == expected + "\n"  # not wrapped at 80 columns
    assert document(cli("generate", compressed, PROMPT, "--tokens", "30", "--json")) == {
        "prompt": PROMPT,
        "text": expected,
    }


def test_generate_without_the_sidecar_is_another_model(
    cli: Cli, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("swquant.derive.generate", lambda *_, restore, **__: seen.append(restore) or "text")
    cli("generate", compressed, "t5")
    cli("generate", compressed, "t5", "--no-restore")
    assert seen == [True, False]
