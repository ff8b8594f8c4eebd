"""`swquant inspect`, `verify` and `doctor`: what a folder holds, whether it is whole, what this machine lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from support.command_line import Cli, document
from support.tiny_models import Planted


def test_inspect_shows_what_is_in_it(cli: Cli, compressed: Path, bf16_llama: Planted) -> None:
    ran = cli("inspect", compressed)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"1\.mlp\.down_proj\s+37, 101\s+60\s+60\s", ran.out)
    for word in ("dense: embedding", "dense: lm_head", "swquant.load", "transformers", "vLLM", "--outliers 0.01"):
        assert word in ran.out


def test_verify_says_that_all_is_well_or_what_is_damaged(cli: Cli, damaged: Path) -> None:
    ran = cli("verify", damaged)
    assert (ran.code, ran.err) == (0, "")
    assert "every byte as written" in ran.out
    assert document(cli("verify", damaged, "--json")) == {"ok": True, "problems": []}
    config = damaged / "generation_config.json"
    config.write_text(config.read_text() + " ")
    ran = cli("verify", damaged)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("damaged: generation_config.json")
    assert len(ran.err.splitlines()) == 1
    ran = cli("verify", damaged, "--json")
    assert (ran.code, ran.err) == (1, "")
    assert json.loads(ran.out)["ok"] is False


def test_doctor(cli: Cli) -> None:
    report = document(cli("doctor", "--json"))
    assert report["packages"]["torch"] == torch.__version__
    assert report["missing"] == []
    ran = cli("doctor")
    assert "Nothing is missing." in ran.out
    assert torch.__version__ in ran.out
