"""What lies beside the weights: what a loader needs comes along, what could harm does not, what is lost is listed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_models import PROMPT, read_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant
from swquant.checkpoints.companions import without_lost_code

NEEDED = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "tekken.json",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "emoji.json",
    "modules.json",
    "1_Pooling/config.json",
    "LICENSE",
    "NOTICE",
)
CODE = ("tokenization_own.py", "helper.py", "tokenizer_of_mine.py", "custom_generate/generate.py")
HARMFUL = ("vocab.pkl", "tokenizer.bin", "tokenizer.so", "vocab.pt")
LEFT = ("params.json", "original", "notes.txt")

MODELING = """
from transformers import LlamaForCausalLM
from .configuration_mini import MiniConfig
class MiniForCausalLM(LlamaForCausalLM):
    config_class = MiniConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig
class MiniConfig(LlamaConfig):
    model_type = "mini_of_tests"
"""


def put(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_a_loader_needs_is_copied_and_the_rest_is_listed(source: Path, tmp_path: Path) -> None:
    put(
        source,
        *NEEDED,
        *CODE,
        *HARMFUL,
        "params.json",
        "original/params.json",
        "notes.txt",
        ".gitattributes",
        "README.md",
    )
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    written = files_of(result.path)
    assert set(NEEDED) <= written
    assert not written & {*CODE, *HARMFUL, "params.json", "original/params.json", "notes.txt"}
    (note,) = [note for note in result.manifest["notes"] if note.startswith("not copied: ")]
    listed = note.removeprefix("not copied: ").partition("; ")[0].split(", ")
    expected = sorted(["tokenization_own.py", "helper.py", "tokenizer_of_mine.py", "custom_generate/", "original/"])
    assert set(expected) < set(listed)
    assert not {".gitattributes", "README.md", "config.json", "model.safetensors"} & set(listed)
    assert note.endswith("--trust-remote-code copies the Python files")
    assert swquant.verify(result.path) == []


def test_many_lost_files_are_one_line(source: Path, tmp_path: Path) -> None:
    put(source, *(f"extra-{number:03d}.txt" for number in range(200)), "evil\x1b[2J.txt")
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    (note,) = [note for note in result.manifest["notes"] if note.startswith("not copied: ")]
    assert len(note) < 400
    assert note.isprintable()
    assert "189 more" in note


def test_an_ordinary_folder_has_nothing_to_list(source: Path, tmp_path: Path) -> None:
    put(source, "README.md", ".gitattributes", "LICENSE")
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert not [note for note in result.manifest["notes"] if note.startswith("not copied")]


def test_code_that_is_trusted_comes_along_and_pickles_do_not(source: Path, tmp_path: Path) -> None:
    put(source, *CODE, text="")
    put(source, *HARMFUL)
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, trust_remote_code=True).path
    assert set(CODE) <= files_of(out)
    assert not set(HARMFUL) & files_of(out)


def test_a_model_of_its_own_code_loads_from_the_result(source: Path, tmp_path: Path) -> None:
    (source / "modeling_mini.py").write_text(MODELING)
    (source / "configuration_mini.py").write_text(CONFIGURATION)
    own = {"AutoConfig": "configuration_mini.MiniConfig", "AutoModelForCausalLM": "modeling_mini.MiniForCausalLM"}
    edit_json(source / "config.json", model_type="mini_of_tests", architectures=["MiniForCausalLM"], auto_map=own)
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT, trust_remote_code=True).path
    assert read_config(out)["auto_map"] == own
    assert type(swquant.load(out, trust_remote_code=True)).__name__ == "MiniForCausalLM"
    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(stock).__name__ == "MiniForCausalLM"
    with pytest.raises(swquant.SwquantError, match="add --trust-remote-code"):
        swquant.load(out)


def test_a_model_that_needs_no_code_does_not_promise_any(source: Path, tmp_path: Path) -> None:
    """Stock loaders that trust code follow auto_map, even where transformers knows the model."""
    put(source, "modeling_own.py", "tokenization_own.py", text="raise SystemExit('was run')\n")
    edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT).path
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("t5 t9")["input_ids"] == [5, 9]
    swquant.generate(out, "t5 t9", tokens=2, trust_remote_code=True)


def test_code_in_a_repository_stays_named() -> None:
    auto_map = {"AutoConfig": "a/b--configuration.C", "AutoModel": "modeling.M", "AutoTokenizer": [None, "a/b--t.T"]}
    kept = without_lost_code({"auto_map": auto_map, "x": 1})
    assert kept == {"auto_map": {key: auto_map[key] for key in ("AutoConfig", "AutoTokenizer")}, "x": 1}
    assert without_lost_code({"auto_map": {"AutoModel": "modeling.M"}, "x": 1}) == {"x": 1}
    assert without_lost_code({"auto_map": None}) == {"auto_map": None}


def test_a_link_out_of_the_folder_is_not_published(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text("secret")
    (source / "LICENSE").symlink_to(secret)
    with pytest.raises(
        swquant.SwquantError, match="LICENSE is a link out of the folder, to .*id_ed25519.*put the file"
    ):
        swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert not (tmp_path / "out").exists()
    (source / "LICENSE").unlink()
    (source / "terms").write_text("terms")
    (source / "LICENSE").symlink_to("terms")
    out = swquant.compress(source, tmp_path / "out", prompt=PROMPT).path
    assert (out / "LICENSE").read_text() == "terms"
    assert not (out / "LICENSE").is_symlink()


def test_the_links_of_a_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--owner--name/blobs", tmp_path / "models--owner--name/snapshots/0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    out = swquant.compress(snapshot, tmp_path / "out", prompt=PROMPT).path
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()
