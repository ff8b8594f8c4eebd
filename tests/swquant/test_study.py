"""`swquant study`: finds what was planted, nothing in the control, the numbers of `swquant eval`, and repeats no work."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from safetensors.torch import load_file, save_file
from study_world import PROMPT, STOPWORDS, WINDOW, WINDOWS, World, make_world

import swquant
from calibrationless import massive_channels
from exporters.errors import SwquantError
from swquant.checkpoints.open import open_checkpoint
from swquant.drawing.section import Interval, Table
from swquant.models.loading import build_model
from swquant.models.rounded_inputs import RoundedLinear
from swquant.progress import Progress
from swquant.study import measuring
from swquant.study.activations import inputs_rounded
from swquant.study.changes import activation_restored, largest_pruned, rounded, scaled
from swquant.study.options import EXPERIMENTS, StudyOptions
from swquant.study.pipeline import Study, _csv, _load, _plain, _windows, study_checkpoint
from swquant.study.subject import Subject

OPTIONS: dict[str, Any] = {"prompt": PROMPT, "window": WINDOW, "limit": WINDOWS}


def section(study: Study, name: str) -> dict[str, Any]:
    return next(item for item in study.record["sections"] if item["name"] == name)


def rows(study: Study, name: str, table: str) -> list[dict[str, Any]]:
    return section(study, name)["tables"][table]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("planted"), planted=True)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("control"), planted=False)


@pytest.fixture(scope="module")
def study(planted: World) -> Study:
    return swquant.study(planted.folder, planted.text.read_text(), planted.folder.parent / "study", **OPTIONS)


@pytest.fixture(scope="module")
def of_control(control: World) -> Study:
    return swquant.study(
        control.folder, control.text.read_text(), control.folder.parent / "study", quick=True, **OPTIONS
    )


@pytest.fixture
def subject(planted: World) -> Subject:
    options = StudyOptions(**OPTIONS)
    with open_checkpoint(planted.folder) as checkpoint:
        return _load(checkpoint, _windows(checkpoint, planted.text.read_text(), options), options, Progress())


# --- what was planted


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


def test_rounded_inputs_are_those_of_a_loaded_checkpoint(subject: Subject) -> None:
    ids = torch.tensor([[5, 9, 17, 33]])
    for scale, per_token in (("per tensor", False), ("per token", True)):
        with torch.no_grad(), inputs_rounded(scale, "channels").apply(subject):
            ours = subject.model(ids).logits
        with open_checkpoint(subject.checkpoint.folder) as checkpoint:
            model = build_model(checkpoint, torch.float32)
        for name, linear in subject.found.architecture.weights.items():
            channels = massive_channels(subject.found.record(name).peaks).long()
            rounded_linear = RoundedLinear(model.get_submodule(linear.module), channels, per_token=per_token)
            model.set_submodule(linear.module, rounded_linear)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, ours)


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


# --- the numbers of `swquant eval`


def without_super_weight(planted: World, folder: Path) -> Path:
    shutil.copytree(planted.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[planted.name][planted.row, planted.col] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


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


# --- changes can be undone


@pytest.mark.parametrize(
    "name", ["pruned", "amplified", "largest", "restored activation", "rounded", "refined", "inputs"]
)
def test_a_change_leaves_no_trace(subject: Subject, name: str) -> None:
    weights = subject.super_weights
    change = {
        "pruned": lambda: scaled(0, weights),
        "amplified": lambda: scaled(3, weights),
        "largest": lambda: largest_pruned(50),
        "restored activation": lambda: activation_restored(weights),
        "rounded": lambda: rounded("tensor", "plain", subject),
        "refined": lambda: rounded("flat:128", "refined", subject),
        "inputs": lambda: inputs_rounded("per tensor", "channels"),
    }[name]()
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        logits = subject.model(ids).logits
        with suppress(KeyError), change.apply(subject):  # also when it ends badly
            changed = subject.model(ids).logits
            raise KeyError
        assert not torch.equal(changed, logits)
        assert torch.equal(subject.model(ids).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())


def test_the_restored_activation_is_the_planted_one(subject: Subject) -> None:
    """At its token the channel is what it was; at others it stays pruned."""
    outputs: list[torch.Tensor] = []
    module = subject.model.get_submodule("model.layers.1.mlp.down_proj")
    ids = torch.tensor([[5, 9, 17, 33]])

    def run() -> torch.Tensor:
        handle = module.register_forward_hook(lambda *args: outputs.append(args[2][0, :, 37].clone()))
        with torch.no_grad():
            subject.model(ids)
        handle.remove()
        return outputs.pop()

    full = run()
    with scaled(0, subject.super_weights).apply(subject):
        pruned = run()
    with activation_restored(subject.super_weights).apply(subject):
        restored = run()
    assert restored[0] == full[0] > 10_000
    assert torch.equal(restored[1:], pruned[1:])


def test_the_largest_other_weights_are_pruned(subject: Subject) -> None:
    with largest_pruned(50).apply(subject):
        values = torch.cat([matrix.flatten() for matrix in subject.matrices()])
        assert int((values == 0).sum()) == 50
        assert subject.down(subject.super_weights[0].name)[37, 101] == 60.0
    rest = torch.cat([matrix.flatten() for matrix in subject.matrices()]).abs().sort().values
    assert float(values.abs().sort().values[-2]) == float(rest[-52])  # the super weight, then the first that was spared


# --- nothing twice


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def again(world: World, out: Path, **changes: Any) -> tuple[Study, list[str]]:
    notes = Notes()
    with open_checkpoint(world.folder) as checkpoint:
        options = StudyOptions(**{**OPTIONS, **changes})
        return study_checkpoint(checkpoint, world.text.read_text(), out, options, progress=notes), notes.notes


def test_a_second_run_measures_what_is_new_only(study: Study, planted: World, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    only = ("importance", "persistence")
    second, notes = again(planted, out, only=only)
    assert notes == []
    assert second.record["sections"] == [section(study, name) for name in only]
    kept = sorted((out / "cache").glob("*.safetensors"))
    for path in kept:
        path.write_bytes(b"damaged")
    third, notes = again(planted, out, only=only)
    assert notes[0].startswith("5 measurements of 144 tokens in 6 windows: about ")
    assert third.record == second.record
    page = (out / "report.html").read_bytes()
    assert again(planted, out, only=only)[1] == []
    assert (out / "report.html").read_bytes() == page


def test_other_weights_under_the_same_header_are_measured_anew(planted: World, study: Study, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    pruned = without_super_weight(planted, tmp_path / "pruned")
    _, notes = again(World(pruned, planted.text, planted.name), out, only=("importance",))
    assert notes[0].startswith("3 measurements of ")


def test_a_stopped_run_keeps_what_it_measured(planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = measuring.Cache.put

    def stop_after_one(self: measuring.Cache, *args: Any) -> None:
        put(self, *args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Cache, "put", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            again(planted, tmp_path / "study", only=("importance",))
    assert {path.name for path in tmp_path.joinpath("study").iterdir()} == {"cache"}
    assert again(planted, tmp_path / "study", only=("importance",))[1][0].startswith("4 measurements of ")


def test_windows_that_do_not_fit_in_memory_together_give_the_same(
    study: Study, planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_MEMORY", 0.0)
    small, _ = again(planted, tmp_path / "study", only=("importance", "stopwords"))
    assert small.record["sections"] == [section(study, "importance"), section(study, "stopwords")]


# --- files


def test_the_folder_holds_report_figures_and_tables(study: Study) -> None:
    names = {path.relative_to(study.path).as_posix() for path in study.path.rglob("*") if path.is_file()}
    charts = [chart.name for item in study.sections for chart in item.charts]
    tables = [table.name for item in study.sections for table in item.tables]
    assert len(charts) == len(set(charts)) == 11
    assert {name for name in names if not name.startswith("cache/")} == {
        "report.html", "study.json", *(f"figures/{name}.svg" for name in charts), *(f"tables/{name}.csv" for name in tables),
    }  # fmt: skip
    record = json.loads((study.path / "study.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert record == study.record
    with (study.path / "tables/importance.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    values = rows(study, "importance", "importance")
    assert [float(line["perplexity"]) for line in lines] == [row["perplexity"]["value"] for row in values]
    assert float(lines[1]["perplexity low"]) == values[1]["perplexity"]["low"]


def test_the_page_is_whole_and_asks_for_nothing(study: Study) -> None:
    page = (study.path / "report.html").read_text()
    assert page.count("<svg") == 11
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]+"|url\((?!#)|@import|<script', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    for item in study.sections:
        assert item.title in page
    assert "INT8" in page


def test_what_other_options_left_is_removed(study: Study, planted: World, tmp_path: Path) -> None:
    out = Path(shutil.copytree(study.path, tmp_path / "study"))
    again(planted, out, only=("identify",))
    assert {path.name for path in (out / "figures").iterdir()} == {"identify-input.svg", "identify-output.svg"}
    assert {path.name for path in (out / "tables").iterdir()} == {"super-weights.csv", "layers.csv"}


def test_a_loss_that_is_no_number_is_said_to_be_none() -> None:
    assert str(Interval(math.nan)) == "not finite"
    assert _plain(Interval(math.inf, 1.0, math.nan)) == {"value": None, "low": 1.0, "high": None}
    table = Table("t", "", ("a", "b"), (("x", Interval(math.nan)), ("y", 2.0)))
    assert _csv(table).splitlines() == ["a,b,b low,b high", "x,nan,,", "y,2.0,,"]


# --- the command, and what it refuses


def test_the_command_says_what_was_found_and_where(
    cli: Callable[..., Ran], planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["study", planted.folder, "--text", planted.text, "--prompt", PROMPT, "--only", "identify"]
    ran = cli(*words, "--window", WINDOW, "--limit", 2)
    assert ran.code == 0
    assert "1 found: layers[1] [37, 101]" in ran.out
    assert "Report: model-study/report.html" in ran.out
    ran = cli(*words, "--window", WINDOW, "--quick", "--only", "stopwords", "--json", "--out", "other")
    assert (ran.code, ran.err) == (0, "")
    record = json.loads(ran.out)
    assert [item["name"] for item in record["sections"]] == ["identify", "stopwords"]
    assert record["text"] == {"name": "text.txt", "windows": 4, "window": WINDOW, "tokens": 4 * WINDOW}


def refusal(planted: World, out: Path, text: str | None = None, **options: Any) -> str:
    text = planted.text.read_text() if text is None else text
    with pytest.raises(SwquantError) as caught:
        swquant.study(planted.folder, text, out, **{**OPTIONS, **options})
    return str(caught.value)


def test_bad_input_is_one_message(planted: World, tmp_path: Path) -> None:
    out = tmp_path / "study"
    assert refusal(planted, out, only=("identify", "magic")) == (
        f"experiment 'magic' is not one of: {', '.join(EXPERIMENTS)}"
    )
    assert refusal(planted, out, bits=9).startswith("bits 9 is outside 2 to 8")
    short = refusal(planted, out, text="w009 w017 w033 w064 w002 w009 w017 w033")
    assert short == "the text has 8 tokens, less than one window of 24; give a longer text, or --window 2"
    assert "too few to predict any" in refusal(planted, out, text="")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert (
        refusal(planted, tmp_path / "mine")
        == f"{tmp_path / 'mine'}: exists already and is no study; give another --out"
    )
    assert refusal(planted, tmp_path / "mine" / "thesis.txt").endswith(
        "exists already and is no study; give another --out"
    )


def test_a_damaged_model_is_one_message(planted: World, tmp_path: Path) -> None:
    broken = without_super_weight(planted, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SwquantError, match="NaN or infinite"):
        swquant.study(broken, planted.text.read_text(), tmp_path / "study", **OPTIONS)


def test_a_full_disk_is_one_message(planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("swquant.output.destination.shutil.disk_usage", lambda _: full)
    assert re.search(r"no space left; 0\.00 GB are needed", refusal(planted, tmp_path / "study"))


def test_a_model_that_does_not_fit_twice_is_refused(
    planted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swquant.models.memory.available_memory", lambda: 1000)
    assert "holds the model twice in float32, 1.9 MB" in refusal(planted, tmp_path / "study")
