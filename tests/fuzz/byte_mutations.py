"""Damage to any file: bits, bytes, pieces of it; and what can lie in a folder instead of a file."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random


def damaged_bytes(rng: Random, data: bytes, first: int = 0) -> tuple[bytes, str]:
    """Bytes behind the `first` ones flipped, cut, added, repeated or overwritten, and in words."""
    if len(data) <= first:
        return data + b"\0", "a byte more"
    at = rng.randrange(first, len(data))
    count = rng.choice((1, 1, 2, 4, 8, 64, 4096))
    match rng.choice(("flip", "flip", "flip", "cut", "append", "insert", "remove", "overwrite", "repeat")):
        case "flip":
            changed = bytearray(data)
            for place in [at, *(rng.randrange(first, len(data)) for _ in range(rng.choice((0, 0, 2, 9))))]:
                changed[place] ^= 1 << rng.randrange(8)
            return bytes(changed), f"bits flipped, one in byte {at}"
        case "cut":
            return data[:at], f"cut after {at} of {len(data)} bytes"
        case "append":
            return data + rng.randbytes(count), f"{count} bytes appended"
        case "insert":
            return data[:at] + rng.randbytes(count) + data[at:], f"{count} bytes inserted at {at}"
        case "remove":
            return data[:at] + data[at + count :], f"{count} bytes removed at {at}"
        case "overwrite":
            piece = rng.choice((b"\0", b"\xff", b"\x7f", b"{", b'"', b"\x1b")) * count
            return data[:at] + piece + data[at + count :], f"{count} bytes {piece[:1]!r} at {at}"
        case _:
            return data[: at + count] + data[at:], f"{count} bytes at {at} twice"


def replaced_file(rng: Random, path: Path) -> str:
    """Something else put in the place of a file: nothing, a folder, a link to nothing or to itself, a pipe."""
    kind = rng.choice(("nothing", "folder", "link to nothing", "link to itself", "pipe", "endless", "vast"))
    if kind == "vast":
        os.truncate(path, 1 << 35)  # a hole: it takes no space
        return "32 GiB long"
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "link to nothing":
            path.symlink_to("nowhere")
        case "link to itself":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "endless":
            path.symlink_to("/dev/zero")
    return f"{kind} instead"
