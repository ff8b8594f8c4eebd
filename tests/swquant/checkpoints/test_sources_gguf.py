"""GGUF files as people have them: among other files, in parts, from another machine, with a stretched embedding."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.tiny_gguf import PROMPT, WORDS, write_gguf
from support.tiny_models import save_tokenizer
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import swquant
from swquant.checkpoints.open import open_checkpoint

THETA, HALF = 10000.0, 8


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def foreign_tokenizer(folder: Path) -> None:
    save_tokenizer(folder)


def foreign(name: str, content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text) and None


NEIGHBOURS = {
    "a tokenizer": foreign_tokenizer,
    "only its settings": foreign("tokenizer_config.json", {"bos_token": "t3", "eos_token": "t4"}),
    "a template": foreign("chat_template.jinja", "FOREIGN"),
    "a configuration": foreign("config.json", {"model_type": "gpt2"}),
    "added tokens": foreign("added_tokens.json", {"<foreign>": 5}),
    "special tokens": foreign("special_tokens_map.json", {"eos_token": "t"}),
    "generation settings": foreign("generation_config.json", {"eos_token_id": 7}),
    "code": foreign("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_what_lies_beside_the_file_is_not_read(f16: bytes, tmp_path: Path, neighbour: str) -> None:
    alone, among = tmp_path / "alone", tmp_path / "among"
    for folder in (alone, among):
        folder.mkdir()
        (folder / "m.gguf").write_bytes(f16)
    NEIGHBOURS[neighbour](among)
    seen = []
    for folder in (alone, among):
        with open_checkpoint(folder / "m.gguf") as checkpoint:
            tokenizer = checkpoint.tokenizer()
            checkpoint.save_companions(folder)
            seen.append(
                (
                    tokenizer.convert_ids_to_tokens(list(range(9))),
                    (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template, len(tokenizer)),
                    checkpoint.raw_config,
                    checkpoint.generation,
                    (folder / "tokenizer_config.json").read_text(),
                )
            )
    assert seen[0] == seen[1]
    assert seen[0][0] == WORDS[:9]


def test_a_file_without_a_vocabulary_has_no_tokenizer_even_beside_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", vocabulary=False)
    save_tokenizer(tmp_path)
    with pytest.raises(swquant.SwquantError, match=r"m\.gguf: a GGUF file without a vocabulary.*safetensors folder"):
        swquant.detect(tmp_path / "m.gguf", PROMPT)
    swquant.load(tmp_path / "m.gguf")  # asks for no tokenizer


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_split_file_is_named_as_such(tmp_path: Path, number: int) -> None:
    def split(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 57)

    path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
    write_gguf(path, header=split, tensors=slice(number * 20, number * 20 + 20))
    with pytest.raises(
        swquant.SwquantError, match=f"part {number + 1} of .*split into 2 files.*llama-gguf-split --merge"
    ):
        swquant.load(path)


def test_a_folder_of_gguf_files_names_one_to_give(f16: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(f16)
    with pytest.raises(swquant.SwquantError, match=r"a folder of GGUF files; give one of them, as .*m\.gguf"):
        swquant.load(tmp_path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_big_endian_file_is_refused(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", kind, endian=gguf.GGUFEndian.BIG)
    with pytest.raises(swquant.SwquantError, match="big-endian GGUF file; take a little-endian one"):
        swquant.load(tmp_path / "m.gguf")


def plain() -> torch.Tensor:
    """The frequencies of an embedding that is not stretched."""
    return THETA ** -(torch.arange(HALF) / HALF)


def llama3_factors(factor: float, *, low: float = 1.0, high: float = 4.0, original: int = 8192) -> np.ndarray:
    """As llama.cpp's converter computes them: one frequency after the other."""
    factors = []
    for index in range(HALF):
        wavelength = 2 * math.pi * THETA ** (index / HALF)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_rebuilt_from_its_factors(tmp_path: Path, factor: float) -> None:
    factors = llama3_factors(factor)
    assert len(set(factors)) > 2
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    out = swquant.compress(tmp_path / "m.gguf", tmp_path / "out", prompt=PROMPT).path
    for config in (swquant.load(tmp_path / "m.gguf").config, AutoConfig.from_pretrained(out)):
        assert config.rope_parameters["rope_type"] == "llama3"
        assert config.rope_parameters["factor"] == factor
        torch.testing.assert_close(LlamaRotaryEmbedding(config).inv_freq, plain() / torch.from_numpy(factors))


def test_factors_of_one_stretch_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.ones(HALF, np.float32)})
    assert swquant.load(tmp_path / "m.gguf").config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("index", [0, 5, 7])
def test_other_factors_are_refused(tmp_path: Path, index: int) -> None:
    factors = llama3_factors(8.0)
    factors[index] *= 1.01
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(
        swquant.SwquantError, match=r"rope_freqs\.weight divides frequency \d by .*start from the model's"
    ):
        swquant.load(tmp_path / "m.gguf")


def scaling(**keys: Any) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            name = f"llama.rope.scaling.{key}"
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_float32(name, value)

    return add


def test_linear_scaling_named_in_the_header_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", header=scaling(type="linear", factor=4.0))
    config = swquant.load(tmp_path / "m.gguf").config
    torch.testing.assert_close(LlamaRotaryEmbedding(config).inv_freq, plain() / 4)


def test_yarn_named_in_the_header_is_kept(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", header=scaling(type="yarn", factor=4.0, original_context_length=32))
    stretched = swquant.load(tmp_path / "m.gguf").config.rope_parameters
    assert (stretched["rope_type"], stretched["factor"]) == ("yarn", 4.0)
    assert stretched["original_max_position_embeddings"] == 32


@pytest.mark.parametrize(
    "keys",
    [
        {"type": "longrope", "factor": 4.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 2.0},
    ],
    ids=["another type", "yarn of unknown length", "yarn with a key of its own"],
)
def test_scaling_that_cannot_be_said_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", header=scaling(**keys))
    with pytest.raises(swquant.SwquantError, match=r"rope\.scaling has .*known are linear, and yarn.*start from"):
        swquant.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("shift", [1, 2, 31, 32])
@pytest.mark.parametrize("where", ["in the header's padding", "in front of the weights", "in the weights"])
def test_weights_that_are_shifted_are_refused(f16: bytes, tmp_path: Path, where: str, shift: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(f16)
    reader = gguf.GGUFReader(path)
    begin = int(reader.data_offset)
    last = reader.tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)
    at = {"in the header's padding": end, "in front of the weights": begin, "in the weights": begin + 1000}[where]
    path.write_bytes(f16[:at] + b"\1" * shift + f16[at:])
    with pytest.raises(swquant.SwquantError, match="m.gguf: .*fetch it again"):
        open_checkpoint(path)


def test_tensors_that_overlap_are_refused(f16: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(f16)
    last = gguf.GGUFReader(path).tensors[-1].field
    at = last.offset + sum(part.nbytes for part in last.parts) - 8  # its offset
    path.write_bytes(f16[:at] + (0).to_bytes(8, "little") + f16[at + 8 :])
    with pytest.raises(swquant.SwquantError, match="ends at byte .*fetch it again"):
        open_checkpoint(path)
