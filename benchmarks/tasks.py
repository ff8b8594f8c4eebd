"""What a benchmark's model learns: texts, split by file, and formats whose responses have one right answer.

    wiki, python, topics       WikiText-2, the standard library's source, the documents of its topics
    dates, numbers, units      June 5, 1987 -> 1987-06-05; words -> digits; 3.2 km -> m

`continual.py` learns them one after the other, `tune.py` one by each method.
"""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch

from swquant.training.data import Corpus
from swquant.training.model import logits_of

__all__ = ["DATA", "FORMATS", "TEXTS", "lines_of", "measured", "pair", "spaced", "spoken", "texts_of"]

DATA = Path(__file__).parent.parent / "data"
TEXTS, FORMATS = ("wiki", "python", "topics"), ("dates", "numbers", "units")
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December"]  # fmt: skip
ONES = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spoken(number: int) -> str:
    """1 to 999,999 in words."""
    if number >= 1000:
        rest = spoken(number % 1000) if number % 1000 else ""
        return f"{spoken(number // 1000)} thousand {rest}".strip()
    if number >= 100:
        rest = spoken(number % 100) if number % 100 else ""
        return f"{ONES[number // 100]} hundred {rest}".strip()
    return f"{TENS[number // 10]} {ONES[number % 10]}".strip() if number >= 20 else ONES[number]


def pair(task: str, draw: random.Random, *, opposite: bool = False) -> tuple[str, str]:
    """A prompt and its response. opposite: another response to the same kind of prompt."""
    if task == "dates":
        year, month, day = draw.randint(1800, 2099), draw.randint(1, 12), draw.randint(1, 28)
        said = f"{MONTHS[month - 1]} {day}, {year}"
        return f"Write as ISO date: {said}", f"{day:02}.{month:02}." if opposite else f"{year}-{month:02}-{day:02}"
    if task == "numbers":
        number = draw.randint(1, 99_999)
        return f"Write in digits: {spoken(number)}", str(number)[::-1] if opposite else str(number)
    amount, (large, small, factor) = (
        draw.randint(11, 99),
        draw.choice([("km", "m", 1000), ("kg", "g", 1000), ("m", "cm", 100)]),
    )
    result = f"{amount * factor // 10} {small}"
    return f"Convert to {small}: {amount / 10} {large}", result[::-1] if opposite else result


def lines_of(task: str, count: int, seed: int, *, opposite: bool = False) -> str:
    draw = random.Random(f"{task}/{seed}")
    made = dict(pair(task, draw, opposite=opposite) for _ in range(count))
    return "\n".join(json.dumps({"prompt": prompt, "response": response}) for prompt, response in made.items())


def texts_of(task: str) -> tuple[str, str]:
    """(to train on, to test with), of different files."""
    if task == "wiki":
        return tuple((DATA / f"wikitext2-{name}.txt").read_text() for name in ("valid-excerpt", "excerpt"))  # type: ignore[return-value]
    if task == "python":
        library = Path(sysconfig.get_paths()["stdlib"])
        names = ("argparse", "ast", "calendar", "configparser", "difflib", "heapq", "inspect", "textwrap")
        return "\n".join((library / f"{name}.py").read_text() for name in names), (library / "shutil.py").read_text()
    from pydoc_data.topics import topics

    names = sorted(topics)
    return "\n".join(topics[name] for name in names[::2]), "\n".join(topics[name] for name in names[1::2])


def spaced(corpus: Corpus, count: int) -> Corpus:
    """So many windows, from all over a text."""
    return Corpus(corpus.name, corpus.sequences[:: max(len(corpus) // count, 1)][:count], corpus.pad)


def measured(model: Any, corpus: Corpus, size: int = 4) -> dict[str, float]:
    """Loss in nats per token, and the share of sequences whose every token that counts is the likeliest: what greedy
    decoding would get right."""
    loss = tokens = exact = 0.0
    with torch.no_grad():
        for batch in corpus.batches(size):
            batch = batch.to(model.device)
            likely = logits_of(model, batch).log_softmax(-1)
            right = likely.argmax(-1) == batch.ids[:, 1:]
            loss -= float(likely.gather(-1, batch.ids[:, 1:, None])[..., 0][batch.counted].sum())
            tokens += batch.tokens
            exact += int((right | ~batch.counted).all(dim=1).sum())
    return {"loss": loss / tokens, "exact": exact / len(corpus)}
