"""Damaged, incomplete and hostile model folders: one message with the remedy, never a traceback, never silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import PROMPT, Planted

import swquant

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.2.input_layernorm.weight"
LINEAR = "model.layers.2.mlp.up_proj.weight"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def split(folder: Path, *, shards: int = 3) -> dict[str, str]:
    """Turn the one file into several with an index. Returns the index's table."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    table = {name: names[position % shards] for position, name in enumerate(weights)}
    for shard in names:
        save_file({name: weights[name] for name in weights if table[name] == shard}, folder / shard, {"format": "pt"})
    write_index(folder, table)
    return table


def write_index(folder: Path, table: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def rename_in_index(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = split(folder)
        write_index(folder, {**table, LINEAR: name})

    return damage


def disagree(folder: Path) -> None:
    table = split(folder)
    others = set(table.values()) - {table[LINEAR]}
    write_index(folder, {**table, LINEAR: sorted(others)[0]})


def promise(folder: Path) -> None:
    write_index(folder, {**split(folder), "model.layers.9.mlp.up_proj.weight": "model-00001-of-00003.safetensors"})


def truncate(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


def edit_header(old: str, new: str) -> Callable[[Path], None]:
    """Replace text of the header by as many characters."""

    def damage(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        assert data.count(old.encode()) >= 1
        assert len(old) == len(new)
        (folder / SINGLE).write_bytes(data.replace(old.encode(), new.encode(), 1))

    return damage


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: weights.pop(name))


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[7] = value

    return lambda folder: edit_weights(folder, change)


def integers(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: weights.update({name: weights[name].view(torch.int16)}))


DAMAGES = {
    "a shard is missing": (lose_a_shard, "1 of 3 shards are missing, first model-00002.*fetch the model again"),
    "the index leaves the folder": (rename_in_index("../model.safetensors"), "not the name of a safetensors file"),
    "the index is absolute": (rename_in_index("/etc/model.safetensors"), "not the name of a safetensors file"),
    "the index names a pickle": (rename_in_index("model.bin"), "not the name of a safetensors file"),
    "the index names a Windows path": (rename_in_index("..\\model.safetensors"), "not the name of a safetensors file"),
    "the index names nothing": (rename_in_index(""), "not the name of a safetensors file"),
    "the index names what no name can be": (rename_in_index("a" * 300 + ".safetensors"), "1 of 4 shards are missing"),
    "the index is a list": (lambda folder: write_index(folder, [SINGLE]), "weight_map is not a table"),
    "the index holds numbers": (lambda folder: write_index(folder, {LINEAR: 1}), "weight_map is not a table"),
    "the index is damaged": (write(INDEX, '{"weight_map"'), "not JSON.*fetch or save it again"),
    "the index is wrong": (disagree, "the index promises .*up_proj.* which does not hold it; fetch"),
    "the index promises too much": (promise, r"the index promises model\.layers\.9.*fetch the model again"),
    "the file is cut": (truncate, "truncated.*fetch or save it again"),
    "the file is empty": (write(SINGLE, ""), "too few for a header"),
    "the file is a git-lfs pointer": (write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), "header claims"),
    "the header lies about a shape": (edit_header('"shape":[128,64]', '"shape":[129,64]'), "needs .* bytes"),
    "the header lies about a dtype": (edit_header('"dtype":"BF16"', '"dtype":"F64" '), "needs .* bytes"),
    "a dtype is unknown": (edit_header('"dtype":"BF16"', '"dtype":"Q4_2"'), "unknown dtype 'Q4_2'; known are F64"),
    "nothing is there": (empty, "the folder is empty; give a folder saved by"),
    "only a pickle is there": (only_pickle, r"only pickle weights \(pytorch_model.bin\).*save_pretrained"),
    "no weights": (remove(SINGLE), f"no {SINGLE} and no {INDEX}; give a folder"),
    "no configuration": (remove("config.json"), "no config.json; give a folder saved by"),
    "the configuration is damaged": (write("config.json", '{"model_type":'), "config.json: not JSON"),
    "the configuration is a list": (write("config.json", "[]"), "config.json: not a JSON object"),
    "the configuration is no text": (write("config.json", "\0"), "config.json: not JSON"),
    "the model type is unknown": (lambda folder: edit_config(folder, model_type="llamarama"), "llamarama"),
    "the model type is missing": (lambda folder: edit_config(folder, model_type=None), "config.json is not usable"),
    "the model is no causal model": (
        lambda folder: edit_config(folder, model_type="t5"),
        "swquant compresses language models",
    ),
    "the depth is zero": (lambda folder: edit_config(folder, num_hidden_layers=0), "no list of decoder layers"),
    "the width is text": (lambda folder: edit_config(folder, hidden_size="wide"), "config.json|cannot build"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "no usable tokenizer.*put tokenizer.json"),
    "the tokenizer is damaged": (write("tokenizer.json", "{"), "tokenizer.json: not JSON .*fetch or save it again"),
    "the tokenizer is another thing": (write("tokenizer.json", "{}"), "no usable tokenizer"),
    "a file that is copied is damaged": (write("preprocessor_config.json", "{"), "preprocessor_config.json: not JSON"),
    "a linear weight is of whole numbers": (integers(LINEAR), f"{LINEAR} is of whole numbers .torch.int16.*start from"),
    "a norm is of whole numbers": (integers(NORM), f"{NORM} is of whole numbers"),
    "a linear weight is missing": (lose(LINEAR), f"lacks {LINEAR}"),
    "a norm is missing": (lose(NORM), f"lacks {NORM}"),
    "a linear weight is NaN": (poison(LINEAR, torch.nan), "NaN"),
    "a linear weight is infinite": (poison(LINEAR, -torch.inf), "NaN|infinite"),
    "a norm is NaN": (poison(NORM, torch.nan), "NaN"),
    "a norm is infinite": (poison(NORM, torch.inf), "NaN|infinite"),
    "the embedding is NaN where no prompt looks": (poison("model.embed_tokens.weight", torch.nan), "NaN"),
    "the head is NaN": (poison("lm_head.weight", torch.nan), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_one_message_when(source: Path, tmp_path: Path, damage: str) -> None:
    inflict, message = DAMAGES[damage]
    inflict(source)
    with pytest.raises(swquant.SwquantError, match=message) as caught:
        swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/folder", "no such folder or file"),
        ("missing", "no such folder or file"),
        ("", "no such folder or file|no config.json|empty"),
        ("x" * 300, "no such folder or file"),
        ("owner/name", "owner/name: not a folder here, and the hub did not give it .*check the name and the network"),
        (__file__, "neither a folder nor a .gguf file; give the folder that holds config.json"),
    ],
    ids=["path", "word", "nothing", "long", "hub id", "text file"],
)
def test_what_is_no_model_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(swquant.SwquantError, match=message) as caught:
        swquant.detect(model, PROMPT)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(source: Path, tmp_path: Path) -> None:
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    edit_config(source, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(swquant.SwquantError, match="trust"):
        swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    assert not (tmp_path / "ran").exists()


EXTRAS = {
    "extra.empty": (torch.zeros(0, 4, dtype=torch.bfloat16), "not a parameter of the model"),
    "extra.one": (torch.ones(1, dtype=torch.bfloat16), "not a parameter of the model"),
    "extra.scalar": (torch.tensor(3.0), "not a parameter of the model"),
    "extra.matrix": (torch.ones(3, 5), "not a parameter of the model"),
    "extra.integers": (torch.arange(4), "not a parameter of the model"),
}


def test_tensors_that_the_model_does_not_know_are_kept_as_they_are(source: Path, tmp_path: Path) -> None:
    edit_weights(source, lambda weights: weights.update({name: tensor for name, (tensor, _) in EXTRAS.items()}))
    result = swquant.compress(source, tmp_path / "out", prompt=PROMPT)
    written = load_file(result.path / "model-00001-of-00001.safetensors")
    for name, (tensor, reason) in EXTRAS.items():
        assert result.manifest["tensors"][name]["dense"] == reason
        assert written[name].dtype is tensor.dtype
        assert torch.equal(written[name], tensor)
    assert swquant.verify(result.path) == []
    swquant.load(result.path)


def test_a_folder_in_shards_is_read_like_one_file(bf16_llama: Planted, source: Path) -> None:
    split(source)
    assert swquant.detect(source, PROMPT).detection == swquant.detect(bf16_llama.folder, PROMPT).detection


def test_shards_that_the_index_does_not_name_are_not_read(source: Path) -> None:
    split(source)
    (source / "leftover.safetensors").write_bytes(b"garbage")
    assert len(swquant.detect(source, PROMPT).detection.super_weights) == 1


def test_a_model_whose_down_projections_are_zero_is_a_model(source: Path, tmp_path: Path) -> None:
    def clear(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if "down_proj" in name:
                weights[name].zero_()

    edit_weights(source, clear)
    made = swquant.compress(source, tmp_path / "out", prompt=PROMPT, preset="fast")
    assert made.manifest["detection"]["super_weights"] == []
    assert "The largest output of a down projection is 0 in layer" in (made.path / "swquant/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"__metadata__":{"format":1}}', "the metadata is not a JSON object of strings"),
        ('{"__metadata__":[]}', "the metadata is not a JSON object of strings"),
        ('\ufeff{"__metadata__":{}}', "the header is not a JSON object"),
        ('{"__metadata__":{},"__metadata__":{}}', "the header is not a JSON object"),
        ('{"x":{"dtype":"F16","dtype":"BF16","shape":[0],"data_offsets":[0,0]}}', "the header is not a JSON object"),
        ('{"\\ud800":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}', "the header is not a JSON object"),
        ('{"x":{"dtype":"BF16","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}', "x has the shape .0, 4611"),
    ],
)
def test_a_header_that_the_safetensors_package_refuses_is_refused(source: Path, text: str, message: str) -> None:
    data = text.encode()
    (source / SINGLE).write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(swquant.SwquantError, match=message):
        swquant.load(source)
