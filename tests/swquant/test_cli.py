"""The command line as users and scripts meet it: what is on which stream, with which exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import typer
from conftest import PROMPT, Planted, Ran, save_model, tiny_model
from rich.console import Console

import swquant
from swquant.cli import app
from swquant.compress import writing
from swquant.compress.options import CompressOptions

Cli = Callable[..., Ran]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TEXT = " ".join(f"t{41 + 7 * index % 59}" for index in range(90))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def document(ran: Ran) -> dict:
    """The one JSON document on stdout. NaN is not JSON."""
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("}\n")
    return json.loads(ran.out, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def one_line(ran: Ran) -> str:
    """The one line on stderr of a command that failed."""
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.endswith("\n")
    *progress, message = ran.err.splitlines()
    assert all(line.startswith(("Probing", "Loading", "Evaluating", "Generating")) for line in progress), ran.err
    return message


# --- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_it_does(cli: Cli, command: str) -> None:
    ran = cli(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help, parameter.name
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert not flag.startswith("--") or flag in ran.out


def test_help_of_compress_shows_every_field_of_the_options(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    out = cli("compress", "--help").out
    for option in fields(CompressOptions):
        assert f"--{option.name.replace('_', '-')} " in out
        assert option.metadata["help"] in out


def test_compress_uses_the_defaults_of_the_options() -> None:
    parameters = {item.name: item for item in typer.main.get_command(app).commands["compress"].params}  # type: ignore[attr-defined]
    for option in fields(CompressOptions):
        assert (parameters[option.name].default or ()) == (option.default or ()), option.name


def test_version(cli: Cli) -> None:
    ran = cli("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"swquant {swquant.__version__}\n", "")


def test_no_arguments_show_the_commands(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 2
    assert all(re.search(rf"^.\s+{command}\b", ran.out + ran.err, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [["press"], ["detect"], ["compress", "model", "--bits", "nine"], ["compress", "m", "--no-such"], ["eval", "model"]],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_leaves_stdout_alone(cli: Cli, words: list[str]) -> None:
    ran = cli(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert "Usage: swquant" in ran.err


# --- what is on stdout


def test_detect_prints_what_was_found(cli: Cli, planted_llama: Planted) -> None:
    ran = cli("detect", planted_llama.folder, "--prompt", PROMPT)
    assert ran.code == 0
    assert re.search(r"creator\s+1\.mlp\.down_proj\s+37, 101\s+60\s", ran.out)
    assert ran.err == f"Probing {planted_llama.folder.name} with one prompt\n"


def test_detect_json_holds_the_evidence(cli: Cli, planted_llama: Planted) -> None:
    record = document(cli("detect", planted_llama.folder, "--prompt", PROMPT, "--json"))
    (weight,) = record["super_weights"]
    assert (weight["name"], weight["row"], weight["col"], weight["value"]) == (planted_llama.name, 37, 101, 60)
    assert record["model"] == planted_llama.folder.name
    assert record["prompt"] == PROMPT
    assert len(record["layers"]) == 6


def test_detect_on_a_model_without_super_weight_says_so(cli: Cli, control_llama: Path) -> None:
    assert "no super weight" in cli("detect", control_llama, "--prompt", PROMPT).out
    assert document(cli("detect", control_llama, "--prompt", PROMPT, "--json"))["super_weights"] == []


def test_low_memory_finds_the_same(cli: Cli, planted_llama: Planted) -> None:
    words = ("detect", planted_llama.folder, "--prompt", PROMPT, "--json")
    assert document(cli(*words, "--low-memory")) == document(cli(*words))


def test_compress_json_is_the_manifest(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = document(cli("compress", planted_llama.folder, out, "--prompt", PROMPT, "--json"))
    assert result["path"] == str(out)
    assert result["manifest"] == swquant.inspect(out) == document(cli("inspect", out, "--json"))


OPTIONS = {
    "--bits 3": {"bits": 3},
    "--block 32": {"block": "32"},
    "--asymmetric": {"symmetric": False},
    "--clip z=3": {"clip": "z=3"},
    "--preset fast": {"preset": "fast"},
    "--preset best --texts 8": {"preset": "best", "texts": 8},
    "--seed 7": {"seed": 7},
    "--refine none": {"refine": "none"},
    "--no-restore": {"restore": False},
    "--outliers 0.01": {"outliers": 0.01},
    "--bits-budget 5.5": {"bits_budget": 5.5},
    "--dense q_proj --dense *.up_proj.*": {"dense": ["q_proj", "*.up_proj.*"]},
    "--activations int8 --block 32": {"activations": "int8", "block": "32"},
    "--activations int8 --activation-scale per-tensor": {"activations": "int8", "activation_scale": "per-tensor"},
    "--activations int8 --activation-range static": {"activations": "int8", "activation_range": "static"},
    "--dtype float16": {"dtype": "float16"},
    "--shard-size 1MB": {"shard_size": "1MB"},
    "--strict-block --block 64": {"strict_block": True, "block": "64"},
    "--prompt t7": {"prompt": "t7"},
}


@pytest.mark.parametrize("words", OPTIONS)
def test_every_option_arrives(cli: Cli, planted_llama: Planted, tmp_path: Path, words: str) -> None:
    given = ("compress", planted_llama.folder, tmp_path / "out", *words.split(), "--dry-run", "--json")
    default = {**asdict(CompressOptions()), "dense": [], "block": "128"}
    assert document(cli(*given))["options"] == {**default, **OPTIONS[words]}


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
    assert "not a checkpoint" in message
    assert contents(other) == {"cat.jpg"}


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
    expected = swquant.evaluate(compressed, TEXT, bf16_llama.folder, window=20, limit=2)
    assert document(cli(*words)) == asdict(expected)
    expected = swquant.evaluate(compressed, TEXT, bf16_llama.folder, window=20, limit=2, restore=False)
    assert document(cli(*words, "--no-restore")) == asdict(expected)


def test_eval_shows_four_digits(cli: Cli, compressed: Path, bf16_llama: Planted, text: Path) -> None:
    expected = swquant.evaluate(compressed, TEXT, bf16_llama.folder)
    ran = cli("eval", compressed, "--text", text, "--against", bf16_llama.folder)
    assert re.search(rf"perplexity\s+{expected.perplexity:.4f}\s", ran.out)
    assert re.search(rf"perplexity of the original\s+{expected.original_perplexity:.4f}\s", ran.out)
    assert f"{expected.kl:.5f}" in ran.out
    assert f"{expected.top1:.2%}" in ran.out
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
    monkeypatch.setattr("swquant.api.generate", lambda *_, restore, **__: seen.append(restore) or "text")
    cli("generate", compressed, "t5")
    cli("generate", compressed, "t5", "--no-restore")
    assert seen == [True, False]


def test_doctor(cli: Cli) -> None:
    report = document(cli("doctor", "--json"))
    assert report["packages"]["torch"] == torch.__version__
    assert report["missing"] == []
    ran = cli("doctor")
    assert "Nothing is missing." in ran.out
    assert torch.__version__ in ran.out


# --- what goes wrong


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


@pytest.mark.parametrize("command", ["detect", "compress", "inspect", "verify", "eval", "generate"])
def test_a_model_that_is_not_there_is_one_line(cli: Cli, tmp_path: Path, text: Path, command: str) -> None:
    more = {"eval": ["--text", text], "generate": ["t5"]}.get(command, [])
    line = one_line(cli(command, tmp_path / "nothing here", *more))
    assert "nothing here" in line


@pytest.mark.parametrize(
    ("name", "message"), [("no.txt", "cannot be read"), (".", "cannot be read"), ("latin.txt", "not UTF-8")]
)
def test_a_text_that_cannot_be_read_is_one_line(
    cli: Cli, compressed: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert message in one_line(cli("eval", compressed, "--text", tmp_path / name))


def test_max_kl_needs_something_to_compare_with(cli: Cli, compressed: Path, text: Path) -> None:
    assert "--against" in one_line(cli("eval", compressed, "--text", text, "--max-kl", "1"))


@pytest.mark.parametrize(
    ("name", "message"), [("figure.gif", "a plot is .png, .svg or .pdf"), ("no/figure.png", "does not exist")]
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(
    cli: Cli, planted_llama: Planted, tmp_path: Path, name: str, message: str
) -> None:
    ran = cli("detect", planted_llama.folder, "--plot", tmp_path / name)
    assert message in one_line(ran)
    assert "Probing" not in ran.err


def test_plot_is_drawn_beside_the_table(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    figure = tmp_path / "figure.png"
    ran = cli("detect", planted_llama.folder, "--prompt", PROMPT, "--plot", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "37, 101" in ran.out
    assert f"Drew {figure}" in ran.err


def test_a_name_that_looks_like_markup_is_printed_as_it_is(cli: Cli, control_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(control_llama, tmp_path / "tiny [red]"))
    out = tmp_path / "out [bold]x"
    ran = cli("compress", folder, out, "--prompt", PROMPT)
    assert "tiny [red] has no super weight" in ran.out
    assert f"Wrote {out}:" in ran.out
    assert "Probing tiny [red] with one prompt" in ran.err
    assert f"{out}: " in cli("verify", out).out
    assert "[bold]x" in cli("inspect", out).out
    assert "[bold]y" in one_line(cli("verify", tmp_path / "[bold]y"))


def test_an_operating_system_error_is_one_line(cli: Cli, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("swquant.output.verification.verify", refuse)
    assert one_line(cli("verify", compressed)) == "error: model.safetensors: Permission denied"


def test_interrupting_is_exit_code_130_and_leaves_nothing(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(writing, "round_weight", interrupt)
    ran = cli("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT)
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "interrupted; nothing half-written was left behind"
    assert contents(tmp_path) == set()


# --- terminals and pipes


def test_progress_is_plain_lines_in_a_log(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    ran = cli("compress", planted_llama.folder, tmp_path / "out", "--prompt", PROMPT)
    first, *tenths, last = ran.err.splitlines()
    assert first == f"Probing {planted_llama.folder.name} with one prompt"
    assert last == "Verifying every byte"
    assert tenths
    pattern = r"Compressing \d+ %, [\d.]+ [kM]?B of [\d.]+ [kM]B, [\d.]+ [kMG]?B/s, \d+ s left"
    assert all(re.fullmatch(pattern, line) for line in tenths), tenths
    assert tenths[-1].startswith("Compressing 100 %")
    assert "\x1b" not in ran.out + ran.err


def test_eval_counts_tokens_not_bytes(cli: Cli, compressed: Path, text: Path) -> None:
    lines = cli("eval", compressed, "--text", text, "--window", "9").err.splitlines()
    assert lines[0] == "Loading out"
    assert all(
        re.fullmatch(r"Evaluating \d+ %, \d+ tokens of 80 tokens, [\d,]+ tokens/s, \d+ s left", x) for x in lines[1:]
    )


def test_a_terminal_gets_bars_and_colours(
    cli: Cli, planted_llama: Planted, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("out", "err"):
        console = Console(
            stderr=name == "err", highlight=False, force_terminal=True, width=80, color_system="truecolor"
        )
        monkeypatch.setattr(f"swquant.cli.shared.{name}", console)
        monkeypatch.setattr(sys.modules["swquant.cli.main"], name, console)
    out = tmp_path / "out"
    ran = cli("compress", planted_llama.folder, out, "--prompt", PROMPT)
    assert ran.code == 0
    assert "\x1b[1;32mWrote" in ran.out
    assert "Compressing" in ran.err
    assert "Probing" in ran.err
    ran = cli("eval", out, "--text", text, "--window", "10")
    assert ran.code == 0
    assert "Evaluating" in ran.err
    ran = cli("verify", tmp_path)
    assert ran.code == 1
    assert "\x1b[1;31merror:\x1b[0m" in ran.err


def test_a_reader_that_goes_away_is_no_traceback(compressed: Path) -> None:
    """`swquant inspect OUT --json | head -1`, in a real pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "swquant", "inspect", str(compressed), "--json"]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ran.returncode == 1
    assert ran.stderr == ""


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
