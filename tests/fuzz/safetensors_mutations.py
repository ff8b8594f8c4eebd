"""Damage to safetensors files: headers that lie about lengths, offsets, shapes, dtypes and names, and odd values."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.byte_mutations import damaged_bytes
from fuzz.json_mutations import damaged_json

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F8_E8M0", "I64", "I32", "I16", "I8", "U8",
          "U16", "U32", "U64", "BOOL", "C64", "", "bf16", "BF16 ", None, 16, ["BF16"])  # fmt: skip
SIZES = (0, -1, 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, True, None, "64", [64], float("nan"))
NAMES = ("", "x", "__metadata__", "\x1b[31mevil", "a\nb", "\u202eabc", "\ud800", "x" * 100_000, "model", "lm_head.weight",
         "model.layers.99999999999.self_attn.q_proj.weight", "model.layers.-1.mlp.up_proj.weight", "../x", "a.SCB", "x.weight",
         "outliers/x.rows", "a\0b")  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, the bytes behind it)."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _one(rng: Random, header: dict[str, Any]) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


def _length(rng: Random, data: bytes) -> tuple[bytes, str]:
    real = int.from_bytes(data[:8], "little")
    length = rng.choice(
        (0, 1, real - 1, real + 1, real * 2, len(data), len(data) - 8, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    )
    return (length % 2**64).to_bytes(8, "little") + data[8:], f"header length {length}"


def _header_text(rng: Random, data: bytes) -> tuple[bytes, str]:
    end = 8 + int.from_bytes(data[:8], "little")
    text, what = damaged_json(rng, data[8:end])
    return joined(text, data[end:]), f"header: {what}"


def _entry(rng: Random, data: bytes) -> tuple[bytes, str]:
    """One tensor's dtype, shape or offsets."""
    header, body = split(data)
    name = _one(rng, header)
    entry = header[name]
    what = rng.choice(("dtype", "shape", "size", "offsets", "offset", "flat", "transposed"))
    match what:
        case "dtype":
            entry["dtype"] = rng.choice(DTYPES)
        case "shape":
            entry["shape"] = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2, 3, 1000)))]
        case "size" if entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(SIZES)
        case "offsets":
            entry["data_offsets"] = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]
        case "offset":
            which = rng.randrange(2)
            entry["data_offsets"][which] += rng.choice((1, -1, 2, 64, -64, len(body), -len(body)))
        case "flat":
            entry["shape"] = rng.choice(([-1], [1, *entry["shape"]], [*entry["shape"], 1]))
        case _:
            entry["shape"] = entry["shape"][::-1]
    return joined(header, body), f"{what} of {name}: {str(entry)[:120]}"


def _same_size(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Another dtype of the same size: every number of the file still adds up."""
    header, body = split(data)
    name = _one(rng, header)
    same = {
        "BF16": ("F16", "I16"),
        "F16": ("BF16", "I16"),
        "F32": ("I32",),
        "I32": ("F32",),
        "I64": ("F64",),
        "I8": ("U8", "BOOL"),
    }
    header[name]["dtype"] = rng.choice(same.get(header[name]["dtype"], ("U8",)))
    return joined(header, body), f"{name} as {header[name]['dtype']}"


def _names(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A tensor renamed, doubled, taken away, or two exchanged."""
    header, body = split(data)
    name, other = _one(rng, header), _one(rng, header)
    match rng.choice(("rename", "twice", "same bytes", "missing", "exchanged", "empty")):
        case "rename":
            new = rng.choice(NAMES)
            header = {new if key == name else key: value for key, value in header.items()}
            return joined(header, body), f"{name} renamed {new[:40]!a}"
        case "twice":
            text = json.dumps(header)[:-1] + ", " + json.dumps({name: header[other]})[1:]
            return joined(text.encode(), body), f"{name} twice, then as {other}"
        case "same bytes":
            header[name]["data_offsets"] = header[other]["data_offsets"]
            return joined(header, body), f"{name} where {other} is"
        case "missing":
            begin, end = header.pop(name)["data_offsets"]
            for entry in (value for key, value in header.items() if key != "__metadata__"):
                entry["data_offsets"] = [at - (end - begin) * (at >= end) for at in entry["data_offsets"]]
            return joined(header, body[:begin] + body[end:]), f"{name} is missing"
        case "exchanged":
            header[name], header[other] = header[other], header[name]
            return joined(header, body), f"{name} and {other} exchanged"
        case _:
            header["extra.weight"] = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [len(body), len(body)]}
            return joined(header, body), "an empty tensor of [0, 2**62]"


def _values(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Numbers of one tensor: NaN, infinity, the largest, the smallest, zero, noise."""
    header, body = split(data)
    name = _one(rng, header)
    begin, end = header[name]["data_offsets"]
    patterns = {"NaN": b"\xc0\x7f", "Inf": b"\x80\x7f", "-Inf": b"\x80\xff", "largest": b"\x7f\x7f", "subnormal": b"\x01\x00", "zero": b"\0\0",
                "ones": b"\xff\xff"}  # fmt: skip
    what = rng.choice((*patterns, "noise"))
    count = min(end - begin, rng.choice((2, 2, 8, end - begin)))
    at = begin + rng.randrange(0, max(1, end - begin - count + 1)) // 2 * 2
    piece = rng.randbytes(count) if what == "noise" else (patterns[what] * count)[:count]
    return joined(header, body[:at] + piece + body[at + count :]), f"{count} bytes of {what} in {name}"


def _metadata(rng: Random, data: bytes) -> tuple[bytes, str]:
    header, body = split(data)
    text, what = damaged_json(rng, json.dumps(header.get("__metadata__", {"format": "pt"})).encode())
    header.pop("__metadata__", None)
    rest = json.dumps(header).encode()
    return joined(b'{"__metadata__": ' + text + b", " + rest[1:], body), f"metadata: {what}"


def _body(rng: Random, data: bytes) -> tuple[bytes, str]:
    return damaged_bytes(rng, data, 8 + int.from_bytes(data[:8], "little"))


MUTATORS: tuple[Callable[[Random, bytes], tuple[bytes, str]], ...] = (
    _length, _header_text, _header_text, _entry, _entry, _same_size, _names, _names, _values, _values, _metadata, _body, damaged_bytes,
)  # fmt: skip


def damaged_safetensors(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file with something wrong, and in words."""
    return rng.choice(MUTATORS)(rng, data)
