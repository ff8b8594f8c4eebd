"""`swquant compress`: its options arrive, a dry run foretells, and what is refused leaves nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, Planted

import swquant
from swquant.compress import writing
from swquant.compress.options import CompressOptions
from swquant.output import verification


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_compress_json_is_the_manifest(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = document(cli("compress", planted_llama.folder, out, "--prompt", PROMPT, "--json"))
    assert result["path"] == str(out)
    assert result["manifest"] == swquant.inspect(out) == document(cli("inspect", out, "--json"))


OPTIONS = {
    "--bits 3": {"bits": 3},
    "--block 32": {"block": "32"},
    "--asymmetric": {"symmetric": False},
    "--offsets float --block 32": {"offsets": "float", "block": "32"},
    "--clip z=3": {"clip": "z=3"},
    "--preset fast": {"preset": "fast"},
    "--preset best --texts 8": {"preset": "best", "texts": 8},
    "--preset best --texts 2 --text-from MODEL": {"preset": "best", "texts": 2, "text_from": "MODEL"},
    "--seed 7": {"seed": 7},
    "--refine none": {"refine": "none"},
    "--no-restore": {"restore": False},
    "--outliers 0.01": {"outliers": 0.01},
    "--bits-budget 5.5": {"bits_budget": 5.5},
    "--bits-for q_proj=6 --bits-for o_proj=8": {"bits_for": ["q_proj=6", "o_proj=8"]},
    "--embedding-bits 4": {"embedding_bits": 4},
    "--lm-head-bits 8": {"lm_head_bits": 8},
    "--dense q_proj --dense *.up_proj.*": {"dense": ["q_proj", "*.up_proj.*"]},
    "--activations int8 --block 32": {"activations": "int8", "block": "32"},
    "--activations int8 --activation-scale per-tensor": {"activations": "int8", "activation_scale": "per-tensor"},
    "--activations int8 --activation-range static": {"activations": "int8", "activation_range": "static"},
    "--dtype float16": {"dtype": "float16"},
    "--shard-size 1MB": {"shard_size": "1MB"},
    "--strict-block --block 64": {"strict_block": True, "block": "64"},
    "--allow-dense": {"allow_dense": True},
    "--prompt t7": {"prompt": "t7"},
}


@pytest.mark.parametrize("words", OPTIONS)
def test_every_option_arrives(cli: Cli, planted_llama: Planted, tmp_path: Path, words: str) -> None:
    model = str(planted_llama.folder)
    given = ("compress", model, tmp_path / "out", *words.replace("MODEL", model).split(), "--dry-run", "--json")
    default = {**asdict(CompressOptions()), "dense": [], "bits_for": [], "block": "128", "offsets": "none"}
    expected = {key: model if value == "MODEL" else value for key, value in OPTIONS[words].items()}
    assert document(cli(*given))["options"] == {**default, **expected}


def test_every_option_is_tried_above() -> None:
    assert {key for changed in OPTIONS.values() for key in changed} == {item.name for item in fields(CompressOptions)}


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_dry_run_writes_nothing(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(planted_llama.folder)
    ran = cli("compress", planted_llama.folder, "--prompt", PROMPT, "--dry-run", *as_json)
    assert ran.code == 0
    assert contents(tmp_path) == set()
    assert contents(planted_llama.folder) == before
    assert "tiny-llama-w4-b128" in ran.out
    for name in ("1.mlp.down_proj", "model.norm", "lm_head", "5.self_attn.o_proj"):
        assert name in ran.out


def test_a_dry_run_foretells_the_bytes(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    words = ("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT, "--outliers", "0.01", "--json")
    plan = document(cli(*words, "--dry-run"))
    manifest = document(cli(*words))["manifest"]
    assert plan["loaders"] == manifest["loaders"]
    for name, tensor in plan["tensors"].items():
        written = manifest["tensors"][name]
        assert {key: written[key] for key in tensor} == tensor


def test_after_ctrl_c_the_same_command_goes_on(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT, "--preset", "fast")
    with monkeypatch.context() as patch:
        patch.setattr(verification, "verify", interrupted)
        ran = cli(*words)
    kept = "57 of 57 tensors are kept: the same command goes on, with --fresh it starts over"
    assert (ran.code, ran.err.splitlines()[-1]) == (130, f"interrupted; {kept}")
    assert "Note: an interrupted run left 57 of 57 tensors, compress goes on" in cli(*words, "--dry-run").out
    assert document(cli(*words, "--dry-run", "--json"))["interrupted"].startswith("an interrupted run left 57")
    refused = one_line(cli(*words, "--bits", "8"))
    assert "with other options (--bits 4, now 8); --fresh starts over, or give another OUT" in refused
    ran = cli(*words)
    assert ran.code == 0
    assert "Going on: 57 of 57 tensors were there" in ran.err
    assert os.listdir(tmp_path) == ["out"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_without_out_the_folder_is_made_here(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("compress", planted_llama.folder, "--prompt", PROMPT, "--bits", "8", "--block", "channel")
    assert "Wrote tiny-llama-w8-bchannel:" in ran.out
    assert os.listdir(tmp_path) == ["tiny-llama-w8-bchannel"]


def test_overwrite_replaces_a_checkpoint_and_nothing_else(cli: Cli, planted_llama: Planted, damaged: Path) -> None:
    words = ("compress", planted_llama.folder, damaged, "--prompt", PROMPT, "--bits", "8")
    assert "--overwrite" in one_line(cli(*words))
    assert swquant.inspect(damaged)["options"]["bits"] == 4
    assert cli(*words, "--overwrite").code == 0
    assert swquant.inspect(damaged)["options"]["bits"] == 8
    other = damaged.parent / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("meow")
    message = one_line(cli("compress", planted_llama.folder, other, "--overwrite"))
    assert "was not made by swquant" in message
    assert contents(other) == {"cat.jpg"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "9"], "error: bits 9 is outside 2 to 8; use 4 for size or 8 for fidelity"),
        (["--bits", "1"], "bits 1 is outside 2 to 8"),
        (["--block", "0"], "block '0' is not one of: a number (128), ROWSxCOLS"),
        (["--block", "flat"], "block 'flat' is not one of"),
        (["--clip", "sigma=3"], "clip 'sigma=3' is not known; use one of: none, z=9, iqr=3, quantile=0.999"),
        (["--clip", "quantile=2"], "at most 1, got 2"),
        (["--outliers", "0.5"], "outliers 0.5 is outside 0 to 0.1"),
        (["--outliers", "nan"], "outliers nan is outside 0 to 0.1"),
        (["--bits-budget", "1.5"], "a budget of 1.5 bits per weight is outside"),
        (["--bits-budget", "nan"], "a budget of nan bits per weight is outside"),
        (["--outliers", "0.01", "--no-restore"], "--outliers needs the sidecar that --no-restore leaves out"),
        (["--dtype", "int8"], "dtype 'int8' is not one of: auto, bfloat16, float16, float32"),
        (["--shard-size", "big"], "size 'big' is not understood; write 5GB, 500MB or 1GiB"),
        (["--shard-size", "1kB"], "shard size 1kB is below 1MB"),
        (["--dense", ""], "an empty --dense pattern would match every tensor"),
        (["--dense", "no.such"], "--dense 'no.such' matches no tensor; names look like model."),
        (["--block", "48", "--strict-block"], "block 48 does not divide in_features"),
        (["--prompt", ""], "the prompt has 0 tokens; give 1 to 512"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line_and_leaves_nothing(
    cli: Cli, planted_llama: Planted, tmp_path: Path, words: list[str], message: str
) -> None:
    line = one_line(cli("compress", planted_llama.folder, tmp_path / "out", *words))
    assert line.startswith("error: ")
    assert message in line
    assert contents(tmp_path) == set()


def test_interrupting_is_exit_code_130_and_leaves_nothing(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(writing, "round_tensor", interrupt)
    ran = cli("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT)
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "interrupted; nothing half-written was left behind"
    assert contents(tmp_path) == set()
