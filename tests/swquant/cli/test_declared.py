"""Options are declared once: the commands' parameters are the fields of the options classes, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from support.command_line import Cli, document, one_line
from support.tiny_models import PROMPT, Planted

import swquant
from exporters.errors import SwquantError
from swquant.adapt.options import AdaptKeywords, AdaptOptions
from swquant.api import Keywords
from swquant.cli import app
from swquant.cli.options import BASIC, OTHER, OUTPUT
from swquant.compress.options import CompressKeywords, CompressOptions
from swquant.declared import GROUPS, check_choices, described, flag, made_of
from swquant.distill.options import DistillKeywords, DistillOptions
from swquant.export.formats import FORMATS, format_named, option_names
from swquant.export.gguf.options import GgufKeywords, GgufOptions
from swquant.export.onnx.options import ExportKeywords, ExportOptions
from swquant.merge.options import MergeKeywords, MergeOptions
from swquant.moe.options import MoeKeywords, MoeOptions
from swquant.progress import Progress
from swquant.study import pipeline
from swquant.study.options import StudyKeywords, StudyOptions
from swquant.terminal.formats import VIEWS
from swquant.tune.options import TuneKeywords, TuneOptions

TAKEN: dict[str, type] = {
    "adapt": AdaptOptions,
    "compress": CompressOptions,
    "distill": DistillOptions,
    "merge": MergeOptions,
    "moe": MoeOptions,
    "study": StudyOptions,
    "tune": TuneOptions,
}
KEYWORDS: dict[type, type] = {
    AdaptOptions: AdaptKeywords,
    CompressOptions: CompressKeywords,
    DistillOptions: DistillKeywords,
    ExportOptions: ExportKeywords,
    GgufOptions: GgufKeywords,
    MergeOptions: MergeKeywords,
    MoeOptions: MoeKeywords,
    StudyOptions: StudyKeywords,
    TuneOptions: TuneKeywords,
}
FIELDS = [pytest.param(name, item, id=f"{name} {flag(item.name)}") for name, of in TAKEN.items() for item in fields(of)]
# What is no field: where to read and write, and how to talk.
OWN = {
    "adapt": {
        "checkpoint",
        "out_folder",
        "task",
        "drop_set",
        "import_set",
        "export_set",
        "device",
        "dry_run",
        "overwrite",
        "as_json",
        "trust_remote_code",
    },
    "compress": {
        "model",
        "out_folder",
        "recipe",
        "like",
        "form",
        "dry_run",
        "overwrite",
        "fresh",
        "workers",
        "ray",
        "as_json",
        "low_memory",
        "memory",
        "device",
        "trust_remote_code",
    },
    "distill": {"teacher", "out_folder", "text", "dry_run", "overwrite", "device", "as_json", "trust_remote_code"},
    "export": {"checkpoint", "target", "form", "overwrite", "as_json", "device", "trust_remote_code"},
    "merge": {
        "checkpoint",
        "out_folder",
        "base",
        "eval_text",
        "against",
        "device",
        "overwrite",
        "as_json",
        "trust_remote_code",
    },
    "moe": {"model", "out_folder", "text", "dry_run", "overwrite", "device", "as_json", "trust_remote_code"},
    "study": {"model", "text", "out_folder", "as_json", "device", "trust_remote_code"},
    "tune": {
        "checkpoint",
        "out_folder",
        "against",
        "text",
        "data",
        "eval_text",
        "whole",
        "device",
        "dry_run",
        "overwrite",
        "as_json",
        "trust_remote_code",
    },
}


def parameters(command: str) -> dict[str, Any]:
    return {item.name: item for item in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]


# --- the command line


@pytest.mark.parametrize(("command", "item"), FIELDS)
def test_a_field_is_a_flag(command: str, item: Any) -> None:
    parameter = parameters(command)[item.name]
    assert parameter.opts == [flag(item.name)]
    assert parameter.secondary_opts == ([flag(item.metadata["off"])] if item.metadata["off"] else [])
    assert parameter.help == item.metadata["help"]
    assert (parameter.default or ()) == (item.default or ())
    assert parameter.rich_help_panel == item.metadata["group"].capitalize()
    assert parameter.multiple == isinstance(item.default, tuple)
    assert parameter.is_flag == isinstance(item.default, bool)
    shown = f"{parameter.metavar} {parameter.help}"
    assert all(str(choice) in shown for choice in item.metadata["choices"])


@pytest.mark.parametrize("command", OWN)
def test_what_is_no_field_is_known(command: str) -> None:
    of_formats = set(option_names()) if command != "study" else set()
    own = {item.name for item in fields(TAKEN[command])} if command in TAKEN else set()
    assert set(parameters(command)) - own - of_formats == OWN[command]


def test_the_options_of_a_format_are_those_of_the_export_and_unset() -> None:
    """But for what `compress` has for all formats, too."""
    of_export, of_compress = parameters("export"), parameters("compress")
    shared = {item.name for item in fields(CompressOptions)} & set(option_names())
    assert shared == {"lm_head_bits"}
    assert set(option_names(beside=CompressOptions)) == set(option_names()) - shared
    for row in FORMATS.values():
        for item in fields(row.options) if row.options is not None else ():
            for parameter in (*([of_compress[item.name]] if item.name not in shared else []), of_export[item.name]):
                assert parameter.opts == [flag(item.name)]
                assert parameter.help == item.metadata["help"]
                assert parameter.default is None
                assert parameter.rich_help_panel == f"With --format {row.name}"
                assert parameter.show_default == (False if item.default is None else str(item.default))


def panels(text: str) -> dict[str, int]:
    """Title -> lines, frame included."""
    return {
        title: len(body.splitlines())
        for title, body in re.findall(r"^╭─ (.+?) ─+╮\n(.*?^╰─+╯)", text, re.MULTILINE | re.DOTALL)
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_a_panel_fits_a_screen(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = cli(command, "--help").out
    assert max(map(len, out.splitlines())) <= width
    shown = panels(out)
    assert all(1 + lines <= 25 for lines in shown.values()), shown
    titles = list(shown)
    of_formats = [f"With --format {name}" for name in FORMATS]
    known = [
        "Arguments",
        "Options",
        BASIC,
        "Tensors",
        "Rounding",
        "Activations",
        "Training",
        OUTPUT,
        *of_formats,
        OTHER,
    ]
    assert titles == [title for title in known if title in titles]
    assert "Options" not in titles or BASIC not in titles


def test_the_groups_are_the_panels(cli: Cli) -> None:
    titles = {title for command in TAKEN for title in panels(cli(command, "--help").out)}
    assert {group.capitalize() for group in GROUPS} <= titles
    of_compress = [title for title in panels(cli("compress", "--help").out) if "--format" not in title][1:]
    assert of_compress == [group.capitalize() for group in GROUPS if group != "training"]


def test_help_is_part_of_the_last_panel(cli: Cli) -> None:
    out = cli("verify", "--help").out
    assert out.index(f"─ {OTHER} ─") < out.index("--json") < out.index("--help")


# --- the Python interface


@pytest.mark.parametrize("options", KEYWORDS, ids=lambda options: options.__name__)
def test_the_keywords_are_the_fields(options: type) -> None:
    hints = get_type_hints(options)
    assert get_type_hints(KEYWORDS[options]) == {item.name: hints[item.name] for item in fields(options)}
    assert KEYWORDS[options].__optional_keys__ == {item.name for item in fields(options)}  # type: ignore[attr-defined]
    assert all(item.default is not MISSING for item in fields(options))


def test_compress_takes_the_keywords_of_all() -> None:
    kinds = [CompressOptions, *(row.options for row in FORMATS.values() if row.options is not None)]
    names = [item.name for kind in kinds for item in fields(kind)]
    assert sorted(Keywords.__optional_keys__) == sorted(set(names))


@pytest.mark.parametrize("given", [{"no_such": 1}, {"graph": "genai", "no_such": 1, "format": "onnx"}], ids=str)
def test_an_unknown_keyword_is_a_type_error(given: dict, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no_such"):
        swquant.compress(tmp_path, **given)


def test_options_may_come_as_an_object_and_change() -> None:
    ready = CompressOptions(bits=3, seed=7)
    assert made_of(CompressOptions, ready, {}) == ready
    assert made_of(CompressOptions, ready, {"bits": 5}) == CompressOptions(bits=5, seed=7)
    assert made_of(CompressOptions, None, {"bits": 5}) == CompressOptions(bits=5)
    with pytest.raises(SwquantError, match="bits 9 is outside"):
        made_of(CompressOptions, ready, {"bits": 9})


def test_the_plan_is_shown_before_anything_is_written(planted_llama: Planted, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def show(planned: Any) -> None:
        assert planned.out == tmp_path / "out"
        assert (planned.format.name, planned.export) == ("checkpoint", None)
        assert planned.prepared.plan.options == CompressOptions(prompt=PROMPT, block="32", offsets="none")
        raise StopError

    with pytest.raises(StopError):
        swquant.compress(
            planted_llama.folder, tmp_path / "out", CompressOptions(prompt=PROMPT), block="32", on_plan=show
        )
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_what_a_dry_run_shows(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    planned = swquant.plan(planted_llama.folder, tmp_path, prompt=PROMPT)  # exists, but nothing will be written
    shown = document(cli("compress", planted_llama.folder, tmp_path, "--prompt", PROMPT, "--dry-run", "--json"))
    assert shown["out"] == str(planned.out)
    assert shown["options"] == planned.prepared.plan.options.as_dict()
    assert shown["bytes"] == planned.prepared.plan.nbytes
    assert (shown["format"], shown["export"]) == ("checkpoint", None)


def test_what_takes_long_reports_its_progress(planted_llama: Planted) -> None:
    class Steps(Progress):
        def __init__(self) -> None:
            self.seen: list[str] = []

        @contextmanager
        def step(self, text: str) -> Iterator[None]:
            self.seen.append(text)
            yield

    steps = Steps()
    found = swquant.detect(planted_llama.folder, PROMPT, progress=steps)
    swquant.evaluate(planted_llama.folder, "t5 t9 t7", progress=steps)
    swquant.generate(planted_llama.folder, "t5", tokens=1, progress=steps)
    name = planted_llama.folder.name
    assert found.model == name
    assert steps.seen == [f"Probing {name} with one prompt", f"Loading {name}", "Generating"]


def test_an_interrupted_study_says_what_stays(
    cli: Cli, planted_llama: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert (tmp_path / "out" / "cache").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "measure", interrupt)
    (tmp_path / "text.txt").write_text("t5 t9 t7 t1 t2 t3")
    words = ("--text", tmp_path / "text.txt", "--out", tmp_path / "out", "--window", 4, "--prompt", PROMPT)
    ran = cli("study", planted_llama.folder, *words)
    assert ran.code == 130
    said = f"interrupted; what was measured stays in {tmp_path / 'out'} and is used by the next run"
    assert said in ran.err.splitlines()


# --- choices and formats


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "slow"}, "preset 'slow' is not one of: fast, balanced, best"),
        ({"refine": "more"}, "refine 'more' is not one of: none, prompt, self"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of: auto, bfloat16, float16, float32"),
        ({"activations": "int4"}, "--activations 'int4' is not one of: none, int8"),
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused_with_the_choices(given: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=f"^{re.escape(message)}$"):
        CompressOptions(**given)


def test_choices_may_be_repeated_and_none_is_one_only_by_default() -> None:
    assert StudyOptions(only=["identify", "stopwords"]).experiments == ("identify", "stopwords")  # type: ignore[arg-type]
    assert ExportOptions(accuracy_level=None).accuracy_level is None
    with pytest.raises(SwquantError, match="--lm-head-bits None is not one of: 0, 4, 8"):
        ExportOptions(lm_head_bits=None)  # type: ignore[arg-type]


def test_a_group_that_does_not_exist_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        described(1, "One.", group="others")
    check_choices(CompressOptions())


def test_the_formats_are_the_choices(cli: Cli, planted_llama: Planted) -> None:
    assert {name: row.name for name, row in FORMATS.items()} == {name: name for name in FORMATS}
    parameter = parameters("compress")["form"]
    assert parameter.metavar == "|".join(FORMATS)
    assert parameter.default in FORMATS
    assert all(f"{row.name} ({row.text})" in parameter.help for row in FORMATS.values())
    assert len({row.suffix for row in FORMATS.values()}) == len(FORMATS)
    assert set(VIEWS) == {*FORMATS, "patches"}
    with pytest.raises(SwquantError, match="^format 'ggml' is not one of: checkpoint, onnx, gguf, mlx$"):
        format_named("ggml")
    line = one_line(cli("compress", planted_llama.folder, "--format", "ggml", "--dry-run"))
    assert line == "error: format 'ggml' is not one of: checkpoint, onnx, gguf, mlx"


def test_a_format_knows_its_options() -> None:
    checkpoint, onnx = FORMATS["checkpoint"], FORMATS["onnx"]
    assert checkpoint.chosen({}, int8=True) is None
    assert onnx.chosen({}, int8=False) == ExportOptions(accuracy_level=0)
    assert onnx.chosen({"graph": "genai"}, int8=True) == ExportOptions("genai", accuracy_level=4)
    for name in option_names([onnx]):
        with pytest.raises(SwquantError, match=f"^{flag(name)} is an option of the export; add --format onnx$"):
            checkpoint.chosen({name: 0}, int8=False)
