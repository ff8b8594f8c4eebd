"""Damage to GGUF files: any field of the header made hostile, and damage to bytes.

The fields are found by a small parser of its own, which knows where each number and string of a sound file stands.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from fuzz.byte_mutations import damaged_bytes

# The type numbers of GGUF's metadata -> struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
ALIGNMENT = 32
_TEXTS = (
    b"",
    b"\xff\xfe",
    b"\x1b[31mevil",
    b"../x",
    b"llama",
    b"gemma3",
    b"bert",
    b"x" * 70_000,
    b"\0",
    b"general.architecture",
    b"blk.0.attn_q.weight",
)


@dataclass(frozen=True)
class Field:
    """A number of the header (struct format `form`), or a string with its length in front (`form` s)."""

    name: str
    start: int
    end: int
    form: str


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, name: str, form: str) -> Field:
        start = self.at
        self.at += struct.calcsize("<" + form)
        return Field(name, start, self.at, form)

    def string(self, name: str) -> tuple[Field, Field, bytes]:
        length = self.number(f"length of {name}", "Q")
        start = self.at
        self.at += self.value(length)
        return length, Field(name, length.start, self.at, "s"), self.data[start : self.at]

    def value(self, field: Field) -> int:
        return int(struct.unpack("<" + field.form, self.data[field.start : field.end])[0])


def fields(data: bytes) -> Iterator[Field]:
    """Every field of a sound file's header."""
    cursor = _Cursor(data)
    yield cursor.number("magic", "I")
    yield cursor.number("version", "I")
    tensors, keys = cursor.number("tensors", "Q"), cursor.number("keys", "Q")
    yield from (tensors, keys)
    for _ in range(cursor.value(keys)):
        length, whole, name = cursor.string("key")
        yield from (length, whole)
        yield (kind := cursor.number(f"type of {name.decode()}", "I"))
        yield from _value(cursor, name.decode(), cursor.value(kind))
    for _ in range(cursor.value(tensors)):
        length, whole, name = cursor.string("tensor")
        yield from (length, whole)
        yield (count := cursor.number(f"dimensions of {name.decode()}", "I"))
        yield from [cursor.number(f"size of {name.decode()}", "Q") for _ in range(cursor.value(count))]
        yield cursor.number(f"type of {name.decode()}", "I")
        yield cursor.number(f"offset of {name.decode()}", "Q")


def _value(cursor: _Cursor, name: str, kind: int) -> Iterator[Field]:
    if kind == _STRING:
        yield from cursor.string(name)[:2]
    elif kind == _ARRAY:
        yield (of := cursor.number(f"items' type of {name}", "I"))
        yield (length := cursor.number(f"items of {name}", "Q"))
        for _ in range(cursor.value(length)):
            yield from _value(cursor, f"item of {name}", cursor.value(of))
    else:
        yield cursor.number(name, _SCALARS[kind])


def _hostile(rng: Random, field: Field, data: bytes) -> bytes:
    if field.form == "s":
        text = rng.choice(_TEXTS)
        return len(text).to_bytes(8, "little") + text
    if field.form in "fd":
        value = rng.choice((0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 2.0))
        return struct.pack("<" + field.form, value)
    size = field.end - field.start
    old = int.from_bytes(data[field.start : field.end], "little")
    wide = 2 ** (8 * size)
    value = rng.choice((0, 1, 2, 3, 4, 7, 8, 9, 13, 31, 32, 33, 255, 10**6, wide - 1, wide // 2, wide // 2 - 1, 2**31, 2**32, old + 1, old - 1,
                        old * 2, old * 1000, old // 2, old << 8))  # fmt: skip
    return (value % wide).to_bytes(size, "little")


def _swapped(rng: Random, data: bytes) -> tuple[bytes, str]:
    """The first numbers in the other byte order, as a file of a big-endian machine has them."""
    return data[:4] + data[7:3:-1] + data[15:7:-1] + data[23:15:-1] + data[24:], "big-endian beginning"


def damaged_gguf(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A GGUF file with something wrong, and in words."""
    known = list(fields(data))
    chance = rng.random()
    if chance < 0.03:
        return _swapped(rng, data)
    if chance < 0.15:
        return damaged_bytes(rng, data)
    if chance < 0.25:
        header, what = damaged_bytes(rng, data[: known[-1].end])
        return header + data[known[-1].end :], f"header: {what}"
    if chance < 0.3:
        return damaged_bytes(rng, data, known[-1].end)
    words = []
    # Fields of the vocabulary are many: every name as likely. From the last to the first, so that offsets stay true.
    by_name: dict[str, list[Field]] = {}
    for field in known:
        by_name.setdefault(field.name, []).append(field)
    chosen = {rng.choice(by_name[rng.choice(list(by_name))]) for _ in range(rng.choice((1, 1, 1, 2, 3)))}
    header, body = data[: known[-1].end], _body(data, known[-1].end)
    for field in sorted(chosen, key=lambda field: field.start, reverse=True):
        new = _hostile(rng, field, data)
        words.append(f"{field.name} = {new[:24].hex()}")
        header = header[: field.start] + new + header[field.end :]
    return header + b"\0" * (-len(header) % ALIGNMENT) + body, ", ".join(words)


def _body(data: bytes, end: int) -> bytes:
    """The bytes of the tensors, which begin at a multiple of the alignment behind the header."""
    return data[end + -end % ALIGNMENT :]
