"""Options: sizes, names and fingerprints. What the command line says of bad values is in cli/test_compress.py."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from calibrationless import Clip, Tile
from exporters.errors import SwquantError
from swquant.compress.options import CompressOptions
from swquant.units import parse_bytes

OTHER = {
    "bits": 3, "block": "64", "symmetric": False, "offsets": "byte", "clip": "z=9", "restore": False, "outliers": 0.01, "dense": ("q_proj",),
    "strict_block": True, "allow_dense": True, "dtype": "float16", "shard_size": "1GB", "prompt": "Hello.",
    "preset": "fast", "refine": "none", "texts": 8, "text_from": "other", "seed": 1, "activations": "int8",
    "activation_scale": "per-tensor", "activation_range": "dynamic", "bits_budget": 5.0, "bits_for": ("q_proj=6",), "embedding_bits": 8,
    "lm_head_bits": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5_000_000_000), ("1GiB", 1 << 30), ("1.5 MB", 1_500_000), ("20kb", 20_000), ("123", 123), ("7B", 7)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5TB", "5 G B", "1e9", "nan"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SwquantError, match="not understood; write 5GB, 500MB or 1GiB"):
        parse_bytes(text)


def test_every_option_changes_the_fingerprint() -> None:
    assert set(OTHER) == {item.name for item in fields(CompressOptions)}
    prints = [CompressOptions().fingerprint("source"), CompressOptions().fingerprint("other source")]
    for key, value in OTHER.items():
        needed = {"activations": "int8", "block": "128"} if key.startswith("activation_") else {}
        needed |= {"preset": "best"} if key in ("texts", "text_from") else {}
        prints.append(CompressOptions(**{**needed, key: value}).fingerprint("source"))
    assert len(set(prints)) == len(prints)
    assert prints[0] == CompressOptions().fingerprint("source")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": 0, "preset": "best"}, "texts 0 is outside 1 to 256"),
        ({"texts": 257, "refine": "self"}, "texts 257 is outside 1 to 256"),
        ({"text_from": "other"}, "--text-from other writes text for --refine self; add it, or --preset best"),
        ({"texts": 64}, "is what the model writes for --refine self; add it, or --preset best"),
    ],
    ids=str,
)
def test_texts_are_those_of_best(given: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        CompressOptions(**given)


def test_words_become_what_the_algorithms_take() -> None:
    options = CompressOptions(block="64X32", clip="IQR=3", dtype="float16")
    assert options.parsed_block == Tile(64, 32)
    assert options.parsed_clip == Clip("iqr", 3.0)
    assert options.parsed_dtype is torch.float16
    assert CompressOptions().parsed_dtype is None


@pytest.mark.parametrize(
    ("bits", "block", "suffix"),
    [
        (4, "128", "-w4-b128"),
        (3, "64x32", "-w3-b64x32"),
        (8, "channel", "-w8-bchannel"),
        (2, "flat:512", "-w2-bflat512"),
    ],
)
def test_the_suffix_is_a_file_name(bits: int, block: str, suffix: str) -> None:
    assert CompressOptions(bits=bits, block=block).suffix == suffix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "--activations 'int4' is not one of: none, int8"),
        ({"activations": "int8", "activation_scale": "row"}, "is not one of: per-token, per-tensor"),
        ({"activation_scale": "per-token"}, "they are not; add --activations int8"),
        ({"activation_range": "static"}, "they are not; add --activations int8"),
        (
            {"activations": "int8", "activation_scale": "per-token", "activation_range": "static"},
            "use --activation-scale per-tensor or --activation-range dynamic",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SwquantError, match=message):
        CompressOptions(**options)


def test_the_block_of_w8a8_is_a_whole_row_unless_another_is_asked_for() -> None:
    assert CompressOptions(bits=8, activations="int8").block_name == "channel"
    assert CompressOptions(bits=8, activations="int8", block="128").block_name == "128"
    assert CompressOptions(bits=4, activations="int8").block_name == "128"
    assert CompressOptions(bits=8, activations="int8").suffix == "-w8a8-bchannel"
