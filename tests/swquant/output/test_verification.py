"""`verify` reports every damage, and names the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.signed import sign

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
    assert names == {*FILES, MANIFEST, "README.md"}  # the last may be rewritten: test_card.py


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
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b'": ', b'":  ', 1),
        lambda text: text.rstrip(b"\n"),
        lambda text: text + b" ",
        lambda text: json.dumps(json.loads(text)).encode(),
        lambda text: text.replace(b'"swquant": "', b'"swquant": "0.0", "swquant": "', 1),
        lambda text: text.replace(b"tiny", b"\\u0074iny", 1),
    ],
    ids=["line ends", "space", "no last line end", "space at the end", "one line", "key twice", "escape"],
)
def test_a_manifest_of_other_bytes_is_reported_though_it_says_the_same(damaged: Path, change: Callable) -> None:
    path = damaged / MANIFEST
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    (problem,) = swquant.verify(damaged)
    assert problem.startswith(f"{MANIFEST}: says what was written in other bytes")


def test_every_bit_of_the_manifest_counts(damaged: Path) -> None:
    path = damaged / MANIFEST
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 200):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            problems = swquant.verify(damaged)
        except swquant.SwquantError as error:
            problems = [str(error)]
        assert problems, place
        assert all("\n" not in problem for problem in problems)


def test_links_to_folders_and_empty_folders_are_seen(damaged: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("x")
    (damaged / "more").symlink_to(other)
    (damaged / "swquant" / "self").symlink_to(".")
    (damaged / "empty" / "within").mkdir(parents=True)
    assert swquant.verify(damaged) == [
        "empty/within/: an empty folder, which is not part of the checkpoint",
        "more: a link to a folder, which no checkpoint has; put the files themselves there",
        "swquant/self: a link to a folder, which no checkpoint has; put the files themselves there",
    ]


def test_a_folder_that_became_a_link_is_seen(damaged: Path, tmp_path: Path) -> None:
    (damaged / "swquant").rename(tmp_path / "swquant")
    (damaged / "swquant").symlink_to(tmp_path / "swquant")
    assert "swquant: a link to a folder, which no checkpoint has; put the files themselves there" in swquant.verify(
        damaged
    )


def test_a_checkpoint_that_is_reached_by_a_link_verifies(compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(compressed)
    assert swquant.verify(tmp_path / "link") == []


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


def change_sidecar(folder: Path, name: str, part: str, value: float) -> None:
    path = folder / SIDECAR
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[f"outliers/{name}.{part}"][0] = value
    save_file(tensors, path, metadata)
    sign(folder)


def test_signing_again_is_what_a_sound_manifest_has(damaged: Path) -> None:
    before = (damaged / MANIFEST).read_bytes()
    sign(damaged)
    assert (damaged / MANIFEST).read_bytes() == before


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


UP = "model.layers.2.mlp.up_proj"
DENSE = "model.layers.2.input_layernorm.weight"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Weights that were changed by somebody who signs: every hash is right."""
    path = folder / FILES[2]
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    tables = json.loads((folder / MANIFEST).read_text())["tensors"]
    for record in tables.values():
        for part in record["sha256"]:
            if part in tensors:
                data = tensors[part].contiguous().flatten().view(torch.uint8).numpy().tobytes()
                record["sha256"][part] = hashlib.sha256(data).hexdigest()
    sign(folder, {"tensors": tables})


def put(name: str, place: int, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(place, value)


def reshaped(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (put(f"{UP}.weight_scale", 3, float("nan")), "weight_scale holds a NaN or infinite value"),
        (put(f"{UP}.weight_scale", 0, float("-inf")), "weight_scale holds a NaN or infinite value"),
        (put(f"{UP}.weight_shape", 0, 64), "contradicts weight_packed"),
        (put(f"{UP}.weight_shape", 1, -64), "contradicts weight_packed"),
        (put(f"{UP}.weight_shape", 1, 32), r"weight_packed \[128, 8\] of torch.int32 is not \[128, 4\]"),
        (put(f"{UP}.weight_shape", 1, 63), r"its shape is \[128, 63\], the manifest says \[128, 64\]"),
        (reshaped(f"{UP}.weight_packed", lambda codes: codes[:, :-1]), r"weight_packed \[128, 7\]"),
        (reshaped(f"{UP}.weight_packed", lambda codes: codes.to(torch.int64)), "of torch.int64 is not"),
        (reshaped(f"{UP}.weight_scale", lambda scale: scale.to(torch.float64)), "weight_scale is of torch.float64"),
        (reshaped(f"{UP}.weight_scale", lambda scale: scale[:-1]), "contradicts weight_packed"),
        (put(DENSE, 5, float("nan")), f"{DENSE} holds a NaN or infinite value"),
        (put(DENSE, 5, float("inf")), f"{DENSE} holds a NaN or infinite value"),
        (reshaped(DENSE, lambda gain: gain[:-1]), r"has the shape \[63\], the manifest says \[64\]"),
    ],
)  # fmt: skip
def test_impossible_weights_are_reported_and_not_loaded(damaged: Path, change: Callable, problem: str) -> None:
    change_weights(damaged, change)
    (found,) = swquant.verify(damaged)
    assert re.search(problem, found), found
    assert found.startswith(f"{FILES[2]}: ")
    with pytest.raises(swquant.SwquantError, match=problem) as caught:
        swquant.load(damaged)
    assert "\n" not in str(caught.value)


def test_changing_nothing_and_signing_it_leaves_it_sound(damaged: Path) -> None:
    change_weights(damaged, lambda tensors: None)
    assert swquant.verify(damaged) == []
