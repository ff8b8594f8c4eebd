"""README.md of a checkpoint: what it says, that nothing from a file escapes into it, and that it may be rewritten."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.command_line import Cli, one_line
from support.tiny_gguf import write_gguf
from support.tiny_models import PROMPT, Planted, sample_text

import swquant
from exporters.errors import SwquantError
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.checkpoints.origin import cached_repository, front_matter, license_id, repository_id
from swquant.output.card import Measured, add_evaluation, write_card

EVIL = "a`|\\`|<script>alert(1)</script>\n# [x](http://evil.example) www.evil.example @you \x1b[31m---"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a | text.txt"
    path.write_text(sample_text(90))
    return path


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def evaluation(text: str) -> list[str]:
    inside = text.partition("<!-- swquant evaluation -->")[2].partition("<!-- end of swquant evaluation -->")[0]
    return [line for line in inside.splitlines() if line]


# --- what it says


def test_a_card_says_what_the_folder_is(compressed: Path, bf16_llama: Planted) -> None:
    text, manifest = text_of(compressed), swquant.inspect(compressed)
    card = ModelCard(text)  # as the hub reads it
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["swquant", "quantized", "compressed-tensors", "4-bit"]
    assert card.data.base_model is None  # a folder of some name is no repository
    assert f"# `{bf16_llama.folder.name}`, compressed" in text
    for loader in manifest["loaders"]:
        assert f"| {loader} | yes" in text
    kept = sum(cast(Any, record).get("outliers", 0) for record in manifest["tensors"].values())
    assert f"- {kept:,} weights of " in text
    assert f"| `{bf16_llama.name}` | {bf16_llama.row}, {bf16_llama.col} | " in text
    assert 'swquant.load("PATH")' in text
    assert "vllm serve PATH" in text
    assert str(compressed.parent) not in text
    assert "README.md" in manifest["files"]


def test_equal_checkpoints_have_equal_cards(bf16_llama: Planted, compressed: Path, tmp_path: Path) -> None:
    again = swquant.compress(bf16_llama.folder, tmp_path / "other-name", prompt=PROMPT, outliers=0.01).path
    assert text_of(again) == text_of(compressed)


def test_what_a_loader_refuses_is_not_shown_how_to_load(bf16_llama: Planted, tmp_path: Path) -> None:
    out = swquant.compress(bf16_llama.folder, tmp_path / "out", prompt=PROMPT, preset="fast", offsets="float").path
    assert "vllm serve" not in text_of(out)
    assert "compressed-tensors" not in ModelCard(text_of(out)).data.tags


def test_names_from_files_stay_names(compressed: Path, tmp_path: Path) -> None:
    with CompressedCheckpoint(compressed) as checkpoint:
        content: Any = dict(checkpoint.manifest)
        content["source"] = {**content["source"], "name": EVIL}
        content["notes"] = [EVIL] * 20
        content["loaders"] = {**content["loaders"], "vLLM": f"no: it fuses {EVIL} and another"}
        record = next(record for record in content["tensors"].values() if "super_weights" in record)
        content["tensors"] = {
            **content["tensors"],
            EVIL: {**record, "blocks": {EVIL: 3}},
            "b": {"dense": EVIL, "bytes": 1},
        }
        content["options"] = {**content["options"], "block": EVIL}
        write_card(tmp_path, checkpoint, content)
    text = text_of(tmp_path)
    assert set(front_matter(tmp_path)) <= {"library_name", "pipeline_tag", "tags", "license", "base_model"}
    assert "\x1b" not in text
    page = MarkdownIt("commonmark").enable("table").render(text.partition("\n---\n")[2])
    assert not re.search(r"<(?!/?(h1|h2|p|ul|li|code|pre|table|thead|tbody|tr|th|td)\b)(?!!-- )", page)
    assert page.count("<h1>") == 1
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert {len(re.findall("<t[hd]>", row)) for row in rows} == {2, 4}  # of the loaders, of the super weights
    outside = re.sub(r"<(code|pre)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "script" in outside  # a sentence of ours may quote it, as text
    quoted = text.partition("## Notes")[2].partition("## Evaluation")[0]
    assert not re.search(r"http:|www\.evil|(?<!\\)@you", quoted)  # which the hub would make links of


# --- where a model comes from


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("owner/name", "owner/name"),
        ("https://huggingface.co/owner/Name-1.5_b", "owner/Name-1.5_b"),
        ("owner", None),
        ("a/b/c", None),
        ("../../etc", None),
        ("owner/na me", None),
        ("owner/name\n---", None),
        (None, None),
        (["owner/name"], None),
    ],
    ids=str,
)
def test_only_an_id_is_a_repository(text: object, repository: str | None) -> None:
    assert repository_id(text) == repository


def test_a_license_is_an_id() -> None:
    assert license_id("apache-2.0") == "apache-2.0"
    assert [license_id(text) for text in ("x: y", "", None, ["mit"], "mit\nbase_model: a/b", "m" * 41)] == [None] * 6


def test_a_folder_of_the_hubs_cache_knows_its_repository(bf16_llama: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "models--some-one--tiny--llama" / "snapshots" / "0123"
    shutil.copytree(bf16_llama.folder, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: another/one\n---\n# tiny\n")
    assert cached_repository(folder) == "some-one/tiny--llama"
    out = swquant.compress(folder, tmp_path / "out", prompt=PROMPT, preset="fast").path
    data = ModelCard(text_of(out)).data
    assert (data.base_model, data.license) == ("some-one/tiny--llama", "mit")
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert "# tiny" not in text_of(out)
    with open_checkpoint(out) as checkpoint:  # what tune and export make of it
        assert (checkpoint.repository, checkpoint.license) == ("some-one/tiny--llama", "mit")


def test_a_gguf_file_names_its_license_itself(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # of whatever else lies among the downloads
    write_gguf(tmp_path / "model.gguf")
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert (checkpoint.repository, checkpoint.license) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "---\n",
        "---\n[\n---\n",
        "---\n- a\n---\n",
        "---\n&a [*a]\n---\n",
        "---\n!!python/object:os.x {}\n---\n",
        "\xff",
    ],
    ids=str,
)
def test_a_strange_card_is_no_reason_to_stop(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert front_matter(tmp_path) == {}


# --- it may be rewritten


def test_a_card_may_be_rewritten_but_not_be_gone(damaged: Path) -> None:
    (damaged / "README.md").write_text("mine")
    assert swquant.verify(damaged) == []
    (damaged / "README.md").unlink()
    assert swquant.verify(damaged) == ["README.md: listed in the manifest, but not there"]


def test_eval_writes_its_numbers_into_the_card(cli: Cli, damaged: Path, bf16_llama: Planted, text: Path) -> None:
    (damaged / "README.md").write_text(text_of(damaged) + "\nMy own words.\n")
    before = text_of(damaged)
    assert len(evaluation(before)) == 1
    words = ("eval", damaged, "--text", text, "--limit", "2", "--window", "20", "--card")
    expected = swquant.evaluate(damaged, text.read_text(), bf16_llama.folder, window=20, limit=2)
    assert cli(*words, "--against", bf16_llama.folder).code == 0
    row = (
        f"| `a ¦ text.txt` | swquant | {expected.tokens} | 2 | {expected.perplexity:.4f} | "
        f"{expected.original_perplexity:.4f} | {expected.kl:.5f} | {expected.top1:.2%} |"
    )
    assert evaluation(text_of(damaged))[2:] == [row]
    assert cli(*words, "--no-restore").code == 0
    assert cli(*words, "--no-restore").code == 0  # once more, in its place
    lines = evaluation(text_of(damaged))
    assert lines[2] == row
    assert lines[3].startswith(f"| `a ¦ text.txt` | stock loaders | {expected.tokens} | 2 | ")
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}
    assert text_of(damaged).endswith("\nMy own words.\n")
    assert swquant.verify(damaged) == []


def test_a_text_of_any_name_is_one_cell(damaged: Path) -> None:
    for _ in range(2):
        add_evaluation(damaged, Measured(EVIL, True, 10, 1, 2.0, None, None, None))
    assert [line.count("|") for line in evaluation(text_of(damaged))] == [9, 9, 9]


@pytest.mark.parametrize(
    "content", [None, b"mine", b"\xff", b"<!-- end of swquant evaluation --><!-- swquant evaluation -->"]
)
def test_a_card_without_its_place_is_refused_before_the_work(
    cli: Cli, damaged: Path, text: Path, content: bytes | None
) -> None:
    (damaged / "README.md").unlink()
    if content is not None:
        (damaged / "README.md").write_bytes(content)
    line = one_line(cli("eval", damaged, "--text", text, "--card"))
    assert line.startswith(f"error: {damaged}: its README.md ")
    with pytest.raises(SwquantError):
        add_evaluation(damaged, Measured("t", True, 10, 1, 2.0, None, None, None))


def test_only_a_checkpoint_has_a_card(cli: Cli, bf16_llama: Planted, text: Path) -> None:
    line = one_line(cli("eval", bf16_llama.folder, "--text", text, "--card"))
    assert "which alone has a card to write into; leave out --card" in line


def test_the_block_is_yaml(compressed: Path) -> None:
    assert yaml.safe_load(text_of(compressed).split("---")[1])["tags"][0] == "swquant"
