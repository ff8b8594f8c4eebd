"""Tasks for tiny models: texts of words of one range each, and options of `adapt` that learn them in seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

QUICK: dict[str, Any] = {
    "budget": "1bits",
    "block": 16,
    "steps": 20,
    "batch": 4,
    "window": 32,
    "warmup": 2,
    "texts": 4,
    "lr": "5e-2",
}
WORDS = {"low": (2, 40), "high": (60, 100), "more": (4, 42), "middle": (41, 59)}


def text_of(task: str, seed: int = 0, words: int = 32 * 24) -> str:
    """Words of one range, of which each is mostly followed by the next."""
    first, last = WORDS[task]
    draw, word, said = random.Random(f"{task}/{seed}"), first, []
    for _ in range(words):
        word = draw.randint(first, last) if draw.random() < 0.2 or word >= last else word + 1
        said.append(f"t{word}")
    return " ".join(said)


def file_of(folder: Path, task: str, seed: int = 0) -> Path:
    path = folder / f"{task}-{seed}.txt"
    path.write_text(text_of(task, seed))
    return path
