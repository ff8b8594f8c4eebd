"""GGUF files: what is read equals what llama.cpp was given and what transformers reads; damage is one message."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from support.tiny_gguf import KINDS, PROMPT, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import swquant
from swquant.checkpoints.gguf_header import Header, decoded
from swquant.checkpoints.open import open_checkpoint


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, "F16")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_transformers_reads_and_what_was_written(tmp_path: Path, kind: str) -> None:
    state = write_gguf(tmp_path / "m.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    error = {"F32": 0.0, "F16": 1e-3, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[kind]
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.tensors.keys() == theirs.keys() == state.keys()
        for name, original in state.items():
            read = checkpoint.read(name)
            assert (read.dtype, tuple(read.shape)) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
            assert torch.equal(read, theirs[name]), name
            assert (read - original).abs().max() <= error * original.abs().max(), name


def test_the_tokenizer_is_the_files_own(f16: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(f16.parent, gguf_file=f16.name)
    with open_checkpoint(f16) as checkpoint:
        assert checkpoint.tokenizer()(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]


def test_a_gguf_file_is_compressed_into_a_folder_that_stands_alone(f16: Path, tmp_path: Path) -> None:
    result = swquant.compress(f16, tmp_path / "out", prompt=PROMPT)
    assert swquant.verify(result.path) == []
    (weight,) = result.manifest["detection"]["super_weights"]
    assert (weight["name"], weight["row"], weight["col"]) == ("model.layers.1.mlp.down_proj.weight", 37, 101)
    assert result.manifest["source"]["kind"] == "gguf"
    model = swquant.load(result.path)
    assert model.dtype is torch.bfloat16
    assert model.model.layers[1].mlp.down_proj.weight[37, 101] == 60.0
    stock = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto")
    tokens = AutoTokenizer.from_pretrained(result.path)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(stock(tokens).logits, swquant.load(result.path, restore=False)(tokens).logits)


def test_the_default_name_drops_the_suffix(f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert swquant.compress(f16, prompt=PROMPT).path == Path("tiny-w4-b128")


def test_a_gguf_file_cannot_be_probed_from_disk(f16: Path) -> None:
    with pytest.raises(swquant.SwquantError, match="a gguf model must fit in memory; convert it to safetensors"):
        swquant.detect(f16, PROMPT, low_memory=True)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "F16", extra={"blk.0.mystery.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(swquant.SwquantError, match=r"first blk\.0\.mystery\.weight\); convert it"):
        swquant.detect(tmp_path / "m.gguf", PROMPT)


GARBAGE = {
    "no GGUF": (b"PK\x03\x04 a zip file", "does not begin with GGUF"),
    "empty": (b"", "does not begin with GGUF"),
    "only the magic": (b"GGUF", "not a readable GGUF file"),
    "noise": (b"GGUF" + bytes(range(256)) * 40, "not a readable GGUF file"),
    "a billion keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 10**9), "not a readable GGUF file"),
    "a long string": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"abc", "not a readable GGUF file"),
    "no keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "not a readable GGUF file"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_one_message(tmp_path: Path, kind: str) -> None:
    data, message = GARBAGE[kind]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(swquant.SwquantError, match=f"m.gguf: .*{message}") as caught:
        swquant.detect(tmp_path / "m.gguf", PROMPT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.99])
def test_a_cut_file_is_one_message(f16: Path, tmp_path: Path, part: float) -> None:
    data = f16.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(part * len(data))])
    with pytest.raises(swquant.SwquantError, match=r"m\.gguf: not a readable GGUF file .*fetch it again") as caught:
        swquant.detect(tmp_path / "m.gguf", PROMPT)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_one_message(f16: Path, tmp_path: Path) -> None:
    data = f16.read_bytes()
    assert data.count(b"llama") > 1
    (tmp_path / "m.gguf").write_bytes(data.replace(b"llama", b"lemma"))
    with pytest.raises(swquant.SwquantError, match="not a readable GGUF file"):
        swquant.detect(tmp_path / "m.gguf", PROMPT)


def test_the_header_is_what_the_gguf_package_reads(f16: Path) -> None:
    ours, theirs = Header(f16), gguf.GGUFReader(f16)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert (ours.fields[name].contents(), ours.fields[name].offset) == (field.contents(), field.offset)
    for tensor, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.data_offset, tensor.n_bytes) == (other.name, other.data_offset, other.n_bytes)
        assert np.array_equal(tensor.data, other.data)


def test_odd_headers_are_what_the_gguf_package_reads(tmp_path: Path) -> None:
    """Arrays of every kind, arrays of arrays, strings of no and of several bytes a letter."""

    def odd(writer: gguf.GGUFWriter) -> None:
        writer.add_array("odd.numbers", [1, -2, 3])
        writer.add_array("odd.floats", [0.5, -1e30])
        writer.add_array("odd.flags", [True, False, True])
        writer.add_array("odd.words", ["", "\u00e9\u4e2d\U0001f600", "a" * 5000])
        writer.add_array("odd.lists", [[1, 2], [3, 4]])

    write_gguf(tmp_path / "m.gguf", header=odd)
    ours, theirs = Header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    assert [(name, field.contents()) for name, field in ours.fields.items()] == [
        (name, field.contents()) for name, field in theirs.fields.items()
    ]
    assert ours.data_offset == theirs.data_offset


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (7, 96), (576, 32), (1024, 256), (40, 8192)])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "BF16"])
def test_rows_are_decoded_together_as_alone(kind: str, shape: tuple[int, int]) -> None:
    """Any bytes are weights of some value."""
    encoding = gguf.GGMLQuantizationType[kind]
    per_block, size = gguf.GGML_QUANT_SIZES[encoding]
    width = -(-shape[1] // per_block) * size
    data = np.random.default_rng(0).integers(0, 256, (shape[0], width), dtype=np.uint8)
    data.reshape(-1, 2)[:, 1] &= 0xBF  # no NaN among the scales
    tensor = SimpleNamespace(data=data, tensor_type=encoding)
    expected = gguf.dequantize(data, encoding)
    found = decoded(tensor)
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def test_a_header_is_read_once(f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One map of the file for us and for transformers, which maps another file itself."""
    mapped: list[Path] = []
    original = np.memmap.__new__

    def count(kind: type, path: Path, *arguments: object, **options: object) -> np.memmap:
        mapped.append(Path(path).resolve())
        return original(kind, path, *arguments, **options)

    monkeypatch.setattr(np.memmap, "__new__", count)
    with open_checkpoint(f16) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is checkpoint.tokenizer()
        assert mapped == [f16.resolve()]
        plain = AutoTokenizer.from_pretrained(f16.parent, gguf_file=f16.name)
        assert tokenizer.get_vocab() == plain.get_vocab()
    assert len(mapped) > 1
