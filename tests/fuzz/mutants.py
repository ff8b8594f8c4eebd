"""What is damaged, how, and what is then run on it: one row of KINDS per kind of file.

Mutant N is always the same: kind N modulo their number, and everything else from a generator seeded with N.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz.byte_mutations import replaced_file
from fuzz.gguf_mutations import damaged_gguf
from fuzz.json_mutations import damaged_json
from fuzz.safetensors_mutations import damaged_safetensors, joined, split
from fuzz.worlds import MANIFEST, SIDECAR, seal_manifest, sealed

INDEX = "model.safetensors.index.json"
Damage = Callable[[Random, Path], str]


@dataclass(frozen=True)
class Kind:
    """worlds: one of which is damaged. damage: changes a folder, says how. always, one_of: verbs that are run."""

    worlds: tuple[str, ...]
    damage: Damage
    always: tuple[str, ...]
    one_of: tuple[str, ...]


def _in(name: str, damaged: Callable[[Random, bytes], tuple[bytes, str]], replaced: float = 0.04) -> Damage:
    """Damage to one file of a folder. name: a pattern."""

    def damage(rng: Random, folder: Path) -> str:
        path = rng.choice(sorted(folder.glob(name)))
        if rng.random() < replaced:
            return f"{path.name}: {replaced_file(rng, path)}"
        data, what = damaged(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name}: {what}"

    return damage


def _index(rng: Random, folder: Path) -> str:
    """An index that names what it should not, or shards that do not hold what it says."""
    path = folder / INDEX
    index = json.loads(path.read_bytes())
    table: dict[str, str] = index["weight_map"]
    name, other = rng.choice(list(table)), rng.choice(list(table))
    shards = sorted(set(table.values()))
    odd = ("../model.safetensors", "/etc/passwd", "/dev/zero", "", ".", "..", "config.json", "x.safetensors", "\0.safetensors", "\x1b[31m.safetensors",
           "a" * 300 + ".safetensors", "sub/x.safetensors", "C:\\x.safetensors", "\ud800.safetensors", "MODEL.SAFETENSORS", shards[0] + " ")  # fmt: skip
    match rng.choice(
        ("file", "all files", "swap", "lost", "extra", "two shards", "no shard", "single", "empty", "shard")
    ):
        case "file":
            table[name] = rng.choice(odd)
        case "all files":
            new = rng.choice(odd)
            index["weight_map"] = {key: new if value == table[name] else value for key, value in table.items()}
        case "swap":
            table[name], table[other] = table[other], table[name]
        case "lost":
            del table[name]
        case "extra":
            table[rng.choice(("x.weight", "", "\x1b[2J", "model.layers.7.mlp.up_proj.weight"))] = rng.choice(shards)
        case "two shards":
            return _in_two_shards(rng, folder, table)
        case "no shard":
            (folder / rng.choice(shards)).unlink()
            return "a shard is missing"
        case "single":
            (folder / "model.safetensors").write_bytes((folder / shards[0]).read_bytes())
            return "model.safetensors beside the shards"
        case "empty":
            index["weight_map"] = rng.choice(({}, [], None, {"": ""}))
        case _:
            return _in("*.safetensors", damaged_safetensors)(rng, folder)
    path.write_text(json.dumps(index))
    return f"weight_map: {name} -> {ascii(table.get(name))[:80]}"


def _in_two_shards(rng: Random, folder: Path, table: dict[str, str]) -> str:
    """One tensor in a second shard, too, with other values; the index may still say which is meant."""
    name = rng.choice(list(table))
    other = rng.choice([shard for shard in set(table.values()) if shard != table[name]])
    header, body = split((folder / other).read_bytes())
    own, _ = split((folder / table[name]).read_bytes())
    begin, end = own[name]["data_offsets"]
    header[name] = {**own[name], "data_offsets": [len(body), len(body) + end - begin]}
    (folder / other).write_bytes(joined(header, body + rng.randbytes(end - begin)))
    if rng.random() < 0.5:
        del table[name]
        (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return f"{name} is in two shards"


def _index_file(rng: Random, folder: Path) -> str:
    return _index(rng, folder) if rng.random() < 0.6 else _in(INDEX, damaged_json)(rng, folder)


# Patterns that a backtracking matcher needs a very long time for, or that no matcher takes.
_PATTERNS = ("(.+)+#", "(a|t|t)*$", "([t0-9 ]+)*!", "(t*)*(t*)*x", "(?:.|\\w|\\d)+~", "(", "[", "\\p{Nothing}", "(?<=.*)x", "a{1000000}", "",
             "((((.{0,1000}){0,1000}){0,1000}){0,1000})")  # fmt: skip
_IDS = (-1, 127, 128, 10**6, 2**31, 2**32 - 1, 2**32, 2**63, 0.5, "5", None)


def _tokenizer(rng: Random, folder: Path) -> str:
    """A tokenizer whose words have absurd ids, whose model has no type, or whose pattern has no end."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    match rng.choice(("id", "id", "type", "pattern", "pattern", "replace", "added", "model")):
        case "id":
            what = f"id {(value := rng.choice(_IDS))}"
            content["model"]["vocab"][rng.choice(("t0", "t5", "t9"))] = value
        case "type":
            what = f"model type {(value := rng.choice((None, 'BPE', 'Unigram', 'WordPiece', 'x', 0)))}"
            content["model"]["type"] = value
        case "pattern":
            what = f"pattern {(value := rng.choice(_PATTERNS))}"
            content["pre_tokenizer"] = {
                "type": "Split",
                "pattern": {"Regex": value},
                "behavior": "Isolated",
                "invert": False,
            }
        case "replace":
            what = f"replaces {(value := rng.choice(_PATTERNS))}"
            content["normalizer"] = {
                "type": "Replace",
                "pattern": {"Regex": value},
                "content": rng.choice(("", "t", "t" * 10**6)),
            }
        case "added":
            what = f"added token {(value := rng.choice(_IDS))}"
            content["added_tokens"] = [{"id": value, "content": rng.choice(("t5", "", "<x>")), "single_word": False, "lstrip": False,
                                        "rstrip": False, "normalized": False, "special": True}]  # fmt: skip
        case _:
            what = (
                f"model {(value := rng.choice(({}, [], None, {'type': 'BPE', 'vocab': {}, 'merges': [['a', 'b']]})))}"
            )
            content["model"] = value
    path.write_text(json.dumps(content))
    return f"tokenizer.json: {what}"


def _tokenizer_file(rng: Random, folder: Path) -> str:
    return _tokenizer(rng, folder) if rng.random() < 0.4 else _in("tokenizer*.json", damaged_json)(rng, folder)


def _manifest(rng: Random, folder: Path) -> str:
    what = _in(MANIFEST, damaged_json)(rng, folder)
    if rng.random() < 0.75:
        seal_manifest(folder / MANIFEST)
        return f"{what}; sealed"
    return what


def _sealed_or_not(damage: Damage, share: float = 0.75) -> Damage:
    """Damage to a file of a compressed checkpoint, mostly with hashes written anew."""

    def damage_and_seal(rng: Random, folder: Path) -> str:
        what = damage(rng, folder)
        if rng.random() < share:
            sealed(folder)
            return f"{what}; sealed"
        return what

    return damage_and_seal


def _points(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Rows or columns of a patch: outside, negative, twice."""
    header, body = split(data)
    name = rng.choice([key for key in header if key.endswith((".rows", ".cols"))])
    begin, end = header[name]["data_offsets"]
    if begin == end:
        return data + b"\0", "a byte more"
    at = begin + 4 * rng.randrange((end - begin) // 4)
    first = body[begin : begin + 4]
    value = rng.choice(
        (
            b"\xff\xff\xff\xff",
            b"\0\0\0\x80",
            b"\xff\xff\xff\x7f",
            b"\x40\0\0\0",
            b"\x80\0\0\0",
            b"\0\0\0\0",
            first,
            first,
        )
    )
    return joined(header, body[:at] + value + body[at + 4 :]), f"{name}: index {value.hex()}"


def _sidecar(rng: Random, data: bytes) -> tuple[bytes, str]:
    return _points(rng, data) if rng.random() < 0.3 else damaged_safetensors(rng, data)


_SOURCE, _MADE = ("compress",), ("verify", "load")
KINDS: dict[str, Kind] = {
    "safetensors": Kind(("source",), _in("model.safetensors", damaged_safetensors), _SOURCE, ("detect", "generate", "eval", "load")),
    "index": Kind(("sharded",), _index_file, _SOURCE, ("detect", "load")),
    "config": Kind(("source",), _in("config.json", damaged_json), _SOURCE, ("detect", "generate", "eval", "load")),
    "generation": Kind(("source",), _in("generation_config.json", damaged_json), _SOURCE, ("generate", "load")),
    "gguf": Kind(("gguf",), _in("model.gguf", damaged_gguf), _SOURCE, ("detect", "generate")),
    "tokenizer": Kind(("source",), _tokenizer_file, _SOURCE, ("generate", "eval", "detect")),
    "manifest": Kind(("compressed", "int8"), _manifest, ("inspect", *_MADE), ("generate", "eval")),
    "sidecar": Kind(("compressed", "int8"), _sealed_or_not(_in(SIDECAR, _sidecar)), _MADE, ("generate", "inspect")),
    "stored": Kind(("compressed", "int8"), _sealed_or_not(_in("model-*.safetensors", damaged_safetensors)), _MADE, ("eval", "generate")),
    "made": Kind(("compressed", "int8"), _sealed_or_not(_in("*.json", damaged_json)), _MADE, ("eval", "generate", "inspect")),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged copy of a world. model: what a user would type. what: how it was damaged."""

    number: int
    kind: str
    world: str
    folder: Path
    what: str
    verbs: tuple[str, ...]
    as_json: bool

    @property
    def model(self) -> Path:
        return self.folder / "model.gguf" if self.world == "gguf" else self.folder


def plan_mutant(number: int, seed: int, only: str | None = None) -> tuple[str, str, Random]:
    """(kind, world, what decides the rest) of a mutant. only: a kind that all of them are to have."""
    kind = only or list(KINDS)[number % len(KINDS)]
    rng = Random(f"{seed}/{kind}/{number}")
    return kind, rng.choice(KINDS[kind].worlds), rng


def make_mutant(number: int, kind: str, world: str, rng: Random, folder: Path) -> Mutant:
    """Damage a copy of a world."""
    row = KINDS[kind]
    what = row.damage(rng, folder)
    verbs = (*row.always, rng.choice(row.one_of))
    return Mutant(number, kind, world, folder, what, verbs, rng.random() < 0.7)
