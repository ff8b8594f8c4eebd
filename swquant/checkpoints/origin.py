"""Where a model comes from, as far as its files say: its repository on the hub, and its license. For model cards.

A name of a folder is no repository (`out/model` looks like one), so only these count: the hub's cache, whose folders
are named after what was fetched; the keys of a GGUF file; and the card of a checkpoint that swquant wrote. All of it is
untrusted text, and is believed where it has the form of an id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CARD", "cached_repository", "front_matter", "license_id", "repository_id"]

CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,39}")
_LONGEST = 1 << 20  # characters of a card that are looked at


def repository_id(text: object) -> str | None:
    """OWNER/NAME of text that is one, or that is its page; None of any other."""
    name = str(text).removeprefix("https://huggingface.co/").strip("/")
    return name if _REPOSITORY.fullmatch(name) else None


def license_id(text: object) -> str | None:
    """A license as the hub calls it (`apache-2.0`), None of any other text."""
    return text if isinstance(text, str) and _LICENSE.fullmatch(text) else None


def cached_repository(folder: Path) -> str | None:
    """The repository that a folder in the hub's cache (`models--OWNER--NAME/snapshots/…`) was fetched from."""
    parts = folder.resolve().parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return repository_id(parts[0].removeprefix("models--").replace("--", "/", 1))


def front_matter(folder: Path) -> Mapping[str, Any]:
    """What the YAML block at the top of a folder's README.md says, {} where there is none that can be read."""
    import yaml

    try:
        with open(folder / CARD, encoding="utf-8-sig") as file:
            text = file.read(_LONGEST)
        block = re.match(r"---\r?\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
        found = yaml.safe_load(block[1]) if block else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a card is never a reason to stop
        return {}
    return found if isinstance(found, dict) else {}
