"""`verify` reports every damage, and names the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import swquant
from exporters.sidecar import SIDECAR
from swquant.compress.report import REPORT

MANIFEST = "swquant/manifest.json"
FILES = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    SIDECAR,
    REPORT,
)


def test_these_are_all_files(compressed: Path) -> None:
    names = {path.relative_to(compressed).as_posix() for path in compressed.rglob("*") if path.is_file()}
    assert names == {*FILES, MANIFEST}


def test_a_sound_checkpoint_has_no_problems(compressed: Path) -> None:
    assert swquant.verify(compressed) == []


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_reported(damaged: Path, name: str, where: float) -> None:
    data = bytearray((damaged / name).read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    (damaged / name).write_bytes(data)
    problems = swquant.verify(damaged)
    assert len(problems) == 1
    assert problems[0].startswith(f"{name}: its sha256 is not the manifest's")


def test_a_flipped_bit_names_the_tensor_that_it_hit(damaged: Path) -> None:
    path = damaged / FILES[2]
    weights = load_file(path)
    bits = weights["model.layers.2.mlp.up_proj.weight_scale"].view(torch.int16)
    bits[5, 0] ^= 1
    with safe_open(path, "pt") as file:
        order = sorted(file.keys(), key=list(json_header(path)).index)
    rewrite(path, {name: weights[name] for name in order})
    (problem,) = swquant.verify(damaged)
    assert "(model.layers.2.mlp.up_proj.weight_scale of model.layers.2.mlp.up_proj.weight differs)" in problem


def json_header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewrite(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """The same header with other bytes behind it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    body = b"".join(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in weights.values())
    assert len(body) == len(data) - start
    path.write_bytes(data[:start] + body)


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_reported(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    assert swquant.verify(damaged) == [f"{name}: listed in the manifest, but not there"]


@pytest.mark.parametrize(
    "name", ["model-00002-of-00002.safetensors", "swquant/other.json", "remote_code.py", ".hidden"]
)
def test_a_file_that_was_added_is_reported(damaged: Path, name: str) -> None:
    (damaged / name).write_text("x")
    assert swquant.verify(damaged) == [f"{name}: there, but not listed in the manifest"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_reported(damaged: Path, name: str) -> None:
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:-1])
    assert swquant.verify(damaged) == [f"{name}: {len(data) - 1} bytes, the manifest says {len(data)}"]


def test_a_link_to_the_right_bytes_is_right_or_called_a_link(damaged: Path, tmp_path: Path) -> None:
    (damaged / "tokenizer.json").rename(tmp_path / "tokenizer.json")  # as in the hub's cache, where all files are links
    (damaged / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    problems = swquant.verify(damaged)
    assert problems == [] or "link" in problems[0]


def test_a_link_to_nothing_is_reported(damaged: Path, tmp_path: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    (problem,) = swquant.verify(damaged)
    assert problem.startswith("tokenizer.json: ")


def test_several_damages_are_all_reported(damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    (damaged / "config.json").write_text("{}")
    (damaged / "new").write_text("")
    assert [problem.partition(":")[0] for problem in swquant.verify(damaged)] == [
        "tokenizer.json",
        "new",
        "config.json",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"bits": 4', '"bits": 8'), ('"restore": true', '"restore": false'), ('"sha256": "', '"sha256": "0')],
    ids=["option", "switch", "hash"],
)
def test_an_edited_manifest_is_reported(damaged: Path, old: str, new: str) -> None:
    path = damaged / MANIFEST
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(swquant.SwquantError, match="digest does not match"):
        swquant.verify(damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "update swquant"),
        ('{"format": "swquant-manifest", "version": 2}', "version 2 is not swquant-manifest 1; update swquant"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["empty", "list", "object", "future", "deep"],
)
def test_a_manifest_that_is_none_is_one_message(damaged: Path, text: str, message: str) -> None:
    (damaged / MANIFEST).write_text(text)
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.verify(damaged)


def test_a_folder_without_a_manifest_is_refused(bf16_llama, tmp_path: Path) -> None:
    for folder in (bf16_llama.folder, tmp_path, tmp_path / "missing"):
        with pytest.raises(swquant.SwquantError, match=r"no swquant/manifest\.json; not a checkpoint made by swquant"):
            swquant.verify(folder)


def sign(folder: Path, change: dict | None = None) -> None:
    """Make the manifest agree with the files again: what remains is what only a look inside can find."""
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_text()), "digest": "", **(change or {})}
    for name, record in manifest["files"].items():
        data = (folder / name).read_bytes()
        record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest, sort_keys=True)
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def change_sidecar(folder: Path, name: str, part: str, value: float) -> None:
    path = folder / SIDECAR
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[f"outliers/{name}.{part}"][0] = value
    save_file(tensors, path, metadata)
    sign(folder)


def test_signing_again_is_what_a_sound_manifest_has(damaged: Path) -> None:
    before = json.loads((damaged / MANIFEST).read_text())
    sign(damaged)
    assert json.loads((damaged / MANIFEST).read_text()) == before


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("rows", 64, "outside its shape [64, 128]"),
        ("rows", -1, "outside its shape [64, 128]"),
        ("cols", 128, "outside its shape [64, 128]"),
        ("cols", -5, "outside its shape [64, 128]"),
        ("values", float("nan"), "NaN or infinite"),
        ("values", float("inf"), "NaN or infinite"),
    ],
)
def test_an_impossible_outlier_is_reported_and_not_loaded(damaged: Path, part: str, value: float, problem: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change_sidecar(damaged, name, part, value)
    problems = swquant.verify(damaged)
    assert len(problems) == 1
    assert SIDECAR in problems[0]
    assert name in problems[0]
    assert problem in problems[0]
    with pytest.raises(swquant.SwquantError, match="outlier"):
        swquant.load(damaged)


def test_a_sidecar_that_lacks_a_tensor_is_reported_and_not_loaded(damaged: Path) -> None:
    path = damaged / SIDECAR
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    gone = "outliers/model.layers.1.mlp.down_proj.weight."
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(gone)}, path, metadata)
    sign(damaged)
    assert swquant.verify(damaged) == [f"{SIDECAR}: does not hold the outliers that the manifest counts"]
    with pytest.raises(swquant.SwquantError, match="outlier"):
        swquant.load(damaged)


def test_a_tensor_that_the_manifest_does_not_know_is_reported(damaged: Path) -> None:
    path = damaged / FILES[2]
    save_file({**load_file(path), "extra": torch.zeros(1)}, path, {"format": "pt"})
    sign(damaged)
    assert swquant.verify(damaged) == [f"{FILES[2]}: extra is in one of file and manifest only"]
