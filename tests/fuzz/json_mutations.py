"""Damage to JSON: one place of a document made hostile, or its text cut, doubled, flooded.

A hostile value is JSON *text*, not a Python value: NaN, half of a surrogate pair, ten thousand brackets and a key that
is there twice are things that text can say and `json.dumps` will not.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz.byte_mutations import damaged_bytes

_DEEP = 20_000
HOSTILE = (
    "null", "true", "false", "0", "1", "-1", "2", "7", "0.5", "-0.0", "1e-300", "1e308", "1e999", "NaN", "Infinity", "-Infinity",
    "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807", "9223372036854775808",
    "18446744073709551616", "1" + "0" * 40, "-1" + "0" * 40, "1" * 5000,
    '""', '" "', '"0"', '"1"', '"-1"', '"nan"', '"null"', '"default"', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\u202e\\u2066evil"',
    '"\\u001b[31mred\\u001b]0;title\\u0007"', '"line\\nline\\r\\n\\u2028line"', '"\\ud83d\\ude00"', '"[bold red]x[/]"', '"[/]"', '"%s%n{0}{x}"',
    '"../../etc/passwd"', '"/etc/passwd"', '"C:\\\\x"', '"."', '".."', '"__class__"', '"' + "x" * 100_000 + '"',
    "[]", "{}", "[[]]", "[null]", "[0]", "[-1]", "[1, 2]", '[""]', '["a", 1]', "[NaN]", "[{}]", '{"": ""}', '{"a": {"b": []}}',
    '{"__class__": "x"}', "[" + "0," * 20_000 + "0]", "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "0" + "}" * _DEEP,
)  # fmt: skip
_MARK = "\u2603 a place \u2603"  # no document has it


def _places(value: Any) -> list[tuple[Any, Any]]:
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    return [(value, key) for key, _ in children]


def _place(rng: Random, document: Any) -> tuple[Any, Any]:
    """(container, key), found by walking down from the root: every level as likely, however wide it is."""
    container, key = rng.choice(_places(document))
    while isinstance(container[key], dict | list) and container[key] and rng.random() < 0.75:
        container, key = rng.choice(_places(container[key]))
    return container, key


_WHOLE_NUMBERS = (0, 1, -1, 2, 3, 8, 31, 64, 65, 1000, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, 10**30)


def _of_its_type(rng: Random, value: Any, document: Any) -> Any:
    """Another value of the same type, so that no check of types finds it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(_WHOLE_NUMBERS)
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, 1e-300, 1e300, value * 1000))
    if isinstance(value, str):
        container, key = _place(rng, document)
        return rng.choice(("", "x", str(key), str(container[key])[:200], "\x1b[31m", "../x"))
    if value is None:
        return rng.choice((0, "", [], {}))
    items = list(value.items()) if isinstance(value, dict) else value
    return type(value)(rng.sample(items, len(items)) + (items[:1] if isinstance(value, list) else []))


def _nudged(rng: Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 1000, float(value), str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value * 2, [value], value.replace("0", "1")))
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], dict.fromkeys(map(str, value))))
    return rng.choice(([value], list(value or ()), dict(list(value.items())[:-1])) if value else ([value],))


def _written(document: Any, raw: str = "") -> bytes:
    text = json.dumps(document, ensure_ascii=False)
    return text.replace(json.dumps(_MARK, ensure_ascii=False), raw).encode(errors="surrogatepass")


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return ascii(text if len(text) < 40 else f"{text[:36]}… ({len(text)})")


def _edit(rng: Random, document: Any) -> tuple[bytes, str]:
    """One place of a document changed, and in words."""
    container, key = _place(rng, document)
    raw, old = rng.choice(HOSTILE), container[key]
    match rng.choice(("hostile",) * 5 + ("typed",) * 5 + ("nudge",) * 3 + ("delete", "twice", "rename", "add", "swap")):
        case "hostile":
            container[key] = _MARK
            return _written(document, raw), f"{_brief(key)} = {_brief(raw)}"
        case "typed":
            container[key] = _of_its_type(rng, old, document)
            return _written(document), f"{_brief(key)}: {_brief(old)} -> {_brief(container[key])}"
        case "nudge":
            container[key] = _nudged(rng, old)
            return _written(document), f"{_brief(key)}: {_brief(old)} -> {_brief(container[key])}"
        case "delete":
            del container[key]
            return _written(document), f"without {_brief(key)}"
        case "twice" if isinstance(container, dict):
            again = json.dumps(key)
            pair = f"{again}: {json.dumps(old)}, {again}: {raw}"
            changed = {_MARK if name == key else name: value for name, value in container.items()}
            container.clear()
            container |= changed
            text = _written(document).decode(errors="surrogatepass")
            marked = json.dumps(_MARK, ensure_ascii=False) + ": " + json.dumps(old, ensure_ascii=False)
            return text.replace(marked, pair).encode(errors="surrogatepass"), f"{_brief(key)} twice, then {_brief(raw)}"
        case "rename" if isinstance(container, dict):
            name = rng.choice(("", "x", key + "x", "\x1b[31m" + key, "__metadata__", "a/../b", "\ud800", key + "\n"))
            container[name] = container.pop(key)
            return _written(document), f"{_brief(key)} renamed {_brief(name)}"
        case "add" if isinstance(container, dict):
            container[rng.choice(("unknown", "quantization_config", "auto_map", "\x1b[2J"))] = _MARK
            return _written(document, raw), f"a key beside {_brief(key)} = {_brief(raw)}"
        case _:
            other, name = _place(rng, document)
            if other is old or container is other.get(name) if isinstance(other, dict) else container is other[name]:
                return _written(document), "nothing"
            container[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(old))
            return _written(document), f"{_brief(key)} and {_brief(name)} swapped"


_WHOLE = (
    b"", b" ", b"{}", b"[]", b"null", b"0", b'"x"', b"{", b"}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x00" * 1000,
    b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"{} {}", b'{"a":1,}', b"// {}", b"\x1b[31m",
)  # fmt: skip


def damaged_json(rng: Random, data: bytes) -> tuple[bytes, str]:
    """A JSON object with one, two or three things wrong with it, and in words."""
    chance = rng.random()
    if chance < 0.06:
        whole = rng.choice(_WHOLE)
        return whole, f"all of it {_brief(repr(whole))}"
    if chance < 0.2:
        return damaged_bytes(rng, data)
    words = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            break
        if not isinstance(document, dict) or not document:
            break
        data, word = _edit(rng, document)
        words.append(word)
    return data, ", ".join(words)
