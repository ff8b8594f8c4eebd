"""`--recipe FILE`, `--like OUT` and `--bits-for`: options from elsewhere, and bits of one's own for some tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import Cli, one_line
from support.tiny_models import PROMPT, Planted, planted_model

import swquant
from exporters.errors import SwquantError
from swquant.compress.options import CompressOptions


@pytest.fixture
def taken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What `swquant compress` hands on of its words: the options, as a manifest records them, and the rest."""

    def run(*words: object) -> dict[str, Any]:
        seen: list[dict[str, Any]] = []

        def compress(_: str, out: Path | None, options: CompressOptions, **how: Any) -> None:
            seen.append({**how, "options": options.as_dict()})
            raise SwquantError("seen")

        with monkeypatch.context() as patch:
            patch.setattr("swquant.api.compress", compress)
            assert one_line(cli("compress", "model", *words)) == "error: seen"
        (given,) = seen
        return {name: value for name, value in given.items() if name not in ("progress", "on_plan")}

    return run


Taken = Callable[..., dict[str, Any]]

# --- recipes


def test_a_recipe_says_what_could_be_typed(taken: Taken, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "bits: 5\nblock: 32\nbits-for: [down_proj=6]\ndense:\n  - q_proj\n  - layers.0.\nno-restore: true\n"
        "symmetric: false\nstrict_block: false\nclip: none\nseed: 7\noverwrite: true\n"
    )
    words = ("--bits", "5", "--block", "32", "--bits-for", "down_proj=6", "--dense", "q_proj", "--dense", "layers.0.")
    typed = taken(*words, "--no-restore", "--asymmetric", "--seed", "7", "--overwrite")
    assert taken("--recipe", recipe) == typed
    assert (typed["options"]["bits"], typed["options"]["dense"]) == (5, ["q_proj", "layers.0."])


def test_what_is_typed_wins(taken: Taken, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 5\nblock: 64\nasymmetric: true\ndense: [q_proj]\n")
    words = ("--bits", "4", "--symmetric", "--dense", "o_proj", "--recipe", recipe)
    options = taken(*words)["options"]
    assert (options["bits"], options["block"], options["symmetric"]) == (4, "64", True)
    assert options["dense"] == ["o_proj"]


def test_a_recipe_may_choose_the_format(taken: Taken, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("format: onnx\ngraph: genai\nprecision: fp16\naccuracy-level: 4\n")
    given = taken("--recipe", tmp_path / "recipe.yaml")
    assert (given["format"], given["graph"], given["precision"], given["accuracy_level"]) == (
        "onnx",
        "genai",
        "fp16",
        4,
    )


def test_every_option_can_be_in_a_recipe(taken: Taken, tmp_path: Path) -> None:
    """The record of one is a recipe."""
    record = taken("--block", "32", "--outliers", "0.01")["options"]
    assert set(record) == {item.name for item in fields(CompressOptions)}
    given = {name: value for name, value in record.items() if value is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    assert taken("--recipe", tmp_path / "recipe.yaml")["options"] == record


def test_a_recipe_makes_a_checkpoint(cli: Cli, planted_llama: Planted, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"bits: 3\nblock: 32\npreset: fast\nprompt: {PROMPT}\n")
    assert cli("compress", planted_llama.folder, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml").code == 0
    options = swquant.inspect(tmp_path / "out")["options"]
    assert (options["bits"], options["block"], options["preset"]) == (3, "32", "fast")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bitz: 4", "'bitz' is no option of compress; it has accuracy-level, "),
        ("help: true", "'help' is no option of compress"),
        ("recipe: other.yaml", "'recipe' is no option of compress"),
        ("model: x", "'model' is no option of compress"),
        ("bits: [4]", "bits: [4] is not one text or number"),
        ("bits: {a: 4}", "is not one text or number"),
        ("bits: true", "bits: True is not a value that it takes"),
        ("symmetric: 4", "symmetric: 4 is not true or false"),
        ("dense: [[a]]", "dense: [['a']] is not a list of text or number"),
        ("bits: 4\nbits: 5", "an option is there twice; give each once"),
        ("- bits", "not a recipe; write one option a line, as in bits: 4"),
        ("", "not a recipe"),
        ("4: bits", "not a recipe"),
        ("a: [", "not YAML (while parsing"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML (could not determine a constructor"),
        ("\udce4", "not YAML ("),
    ],
    ids=str,
)
def test_what_is_no_recipe_is_one_line(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, errors="surrogateescape")
    line = one_line(cli("compress", "nowhere", "--recipe", recipe))
    assert line.startswith(f"error: {recipe}: ")
    assert message in line


def test_a_value_is_checked_as_if_it_had_been_typed(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: four")
    ran = cli("compress", "nowhere", "--recipe", recipe)
    assert (ran.code, ran.out) == (2, "")
    assert "Invalid value for '--bits'" in ran.err
    recipe.write_text("bits: 9")
    assert "bits 9 is outside" in one_line(cli("compress", "nowhere", "--recipe", recipe))
    assert "cannot be read (No such file" in one_line(cli("compress", "nowhere", "--recipe", tmp_path / "none"))
    assert "cannot be read (Is a directory" in one_line(cli("compress", "nowhere", "--recipe", tmp_path))


# --- like a checkpoint


def test_like_takes_the_options_of_a_checkpoint(cli: Cli, taken: Taken, compressed: Path, tmp_path: Path) -> None:
    made = swquant.inspect(compressed)["options"]
    assert taken("--like", compressed)["options"] == made
    (tmp_path / "recipe.yaml").write_text("bits: 6\nblock: 32\n")
    words = ("--like", compressed, "--recipe", tmp_path / "recipe.yaml", "--block", "64")
    for given in (words, (*words[2:], *words[:2])):
        assert taken(*given)["options"] == {**made, "bits": 6, "block": "64"}
    assert "no swquant/manifest.json" in one_line(cli("compress", "nowhere", "--like", tmp_path))


# --- bits of some tensors


def test_bits_for_names_that_match(planted_llama: Planted, tmp_path: Path) -> None:
    rules = ("proj=5", "down_proj=6", "*layers.0.*=8")
    out = swquant.compress(planted_llama.folder, tmp_path / "out", prompt=PROMPT, preset="fast", bits_for=rules).path
    for name, record in swquant.inspect(out)["tensors"].items():
        if "dense" not in record:
            assert record["bits"] == (8 if "layers.0." in name else 6 if "down_proj" in name else 5)
    assert swquant.verify(out, loads=True) == []


def test_more_bits_hold_larger_blocks_of_a_super_weight(planted_llama: Planted) -> None:
    def dense(**options: object) -> bool:
        how = {"prompt": PROMPT, "preset": "fast", "block": "tensor", **options}
        plan = swquant.plan(planted_llama.folder, **how).prepared.plan  # type: ignore[arg-type]
        return next(tensor for tensor in plan.tensors if tensor.name == planted_llama.name).block is None

    assert dense()
    assert dense(bits_for=("q_proj=8",))
    assert not dense(bits_for=("down_proj=8",))


def test_experts_have_equal_bits(tmp_path: Path) -> None:
    folder = planted_model("mixtral", tmp_path / "model", num_hidden_layers=2).folder
    how = {"prompt": PROMPT, "preset": "fast"}
    plan = swquant.plan(folder, bits_for=("experts=6",), **how).prepared.plan  # type: ignore[arg-type]
    assert {tensor.bits for tensor in plan.quantized if ".experts." in tensor.name} == {6}
    with pytest.raises(
        SwquantError, match=r"--bits-for gives .* 4 bits and .* 6, but transformers loads a mixture only"
    ):
        swquant.plan(folder, bits_for=("experts.1.=6",), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits_for": ("q_proj",)}, "--bits-for q_proj is not PATTERN=N, as in --bits-for down_proj=6"),
        ({"bits_for": ("=6",)}, "--bits-for =6 is not PATTERN=N"),
        ({"bits_for": ("q=six",)}, "--bits-for q=six is not PATTERN=N"),
        ({"bits_for": ("q=-6",)}, "--bits-for q=-6 is not PATTERN=N"),
        ({"bits_for": ("q=9",)}, "--bits-for q=9: bits 9 is outside"),
        ({"bits_for": ("q=6",), "bits_budget": 5.0}, "chooses the bits of every tensor, and --bits-for of some"),
        ({"bits_for": ("q=6",), "offsets": "float"}, "--offsets float does not go with --bits-for"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense(given: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        CompressOptions(**given)


def test_a_pattern_matches_something_and_gguf_has_one_type(planted_llama: Planted, tmp_path: Path) -> None:
    with pytest.raises(SwquantError, match=r"--bits-for 'x_proj' matches no tensor; names look like "):
        swquant.plan(planted_llama.folder, tmp_path / "out", bits_for=("x_proj=6",), prompt=PROMPT)
    with pytest.raises(SwquantError, match="--bits-for: one type for all weights is written here; leave it out"):
        swquant.plan(planted_llama.folder, tmp_path / "o.gguf", format="gguf", bits_for=("q_proj=6",), prompt=PROMPT)


def test_int8_inputs_with_bits_of_their_own_are_packed(planted_llama: Planted) -> None:
    how = {"prompt": PROMPT, "bits": 8, "activations": "int8", "bits_for": ("q_proj=4",)}
    plan = swquant.plan(planted_llama.folder, **how).prepared.plan  # type: ignore[arg-type]
    assert not plan.int8_inputs
    assert {tensor.bits for tensor in plan.quantized} == {4, 8}
