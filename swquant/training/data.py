"""Text to train on, cut into sequences: a text, a file of prompts and responses, or what the model writes itself.

Everything is read and checked before any work: a broken line of a file is named by its number. A sequence knows which
of its tokens count, that is, whose prediction is learned: of a text all, of a conversation those of the responses.

Which sequences a step sees depends on the seed and the step alone, so a run that goes on after an interruption sees
what it would have seen. Processes that train together draw the same batch, and each works on its share of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporters.errors import SwquantError, first_line
from exporters.text import shown
from swquant.checkpoints.base import ModelFolder
from swquant.checkpoints.guard import failures_of
from swquant.checkpoints.tokenizer import begins_with, context_of, encode
from swquant.detect.texts import write_text
from swquant.parallel import world
from swquant.progress import Progress

__all__ = ["Batch", "Corpus", "conversations", "own_windows", "text_windows", "token_windows"]

_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Batch:
    """ids int64 [sequences, length], padded at the end; counted bool [sequences, length - 1]: of which predictions of
    the tokens 1, 2, … the loss is made."""

    ids: Tensor
    counted: Tensor

    @property
    def tokens(self) -> int:
        """How many predictions count."""
        return int(self.counted.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(self.ids.to(device), self.counted.to(device))

    @property
    def mine(self) -> tuple[Batch, float]:
        """The sequences that this process works on, and their share of the predictions that count: a mean over them
        times that share, summed over all processes, is the mean over the whole batch."""
        rows = world().share(len(self.ids))
        part = Batch(self.ids[rows], self.counted[rows])
        return part, part.tokens / self.tokens


@dataclass(frozen=True)
class Corpus:
    """Sequences of token ids, and bool of the same length: which of their tokens count. name: for people."""

    name: str
    sequences: tuple[tuple[Tensor, Tensor], ...]
    pad: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def fingerprint(self) -> str:
        """sha256 of all tokens and of which of them count."""
        digest = hashlib.sha256()
        for ids, counted in self.sequences:
            digest.update(ids.numpy().tobytes() + counted.numpy().tobytes())
        return digest.hexdigest()

    def split(self, share: float = 0.125) -> tuple[Corpus, Corpus]:
        """(to train on, held out): the last ones, at least one and never all. Raises SwquantError for a single one."""
        if len(self) < 2:
            raise SwquantError(
                f"{self.name}: {len(self)} window of text; 2 are the least, one to train on and one to check with: give more "
                "text, or a smaller --window"
            )
        held = min(max(round(len(self) * share), 1), len(self) - 1)
        kept, out = self.sequences[:-held], self.sequences[-held:]
        return Corpus(self.name, kept, self.pad), Corpus(self.name, out, self.pad)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some sequences side by side."""
        chosen = [self.sequences[index] for index in indices]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([ids for ids, _ in chosen], batch_first=True, padding_value=self.pad)
        counted = pad([counted for _, counted in chosen], batch_first=True, padding_value=False)
        return Batch(ids, counted[:, 1:])

    def drawn(self, number: int, size: int, seed: int) -> Batch:
        """The batch with this number: `size` sequences, each seen once before any is seen again, in an order that the
        seed makes anew every time."""
        indices = []
        for place in range(number * size, (number + 1) * size):
            epoch, index = divmod(place, len(self))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            indices.append(int(torch.randperm(len(self), generator=generator)[index]))
        return self.batch(indices)

    def batches(self, size: int) -> Iterator[Batch]:
        """All sequences in their order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    @property
    def mine(self) -> Corpus:
        """The sequences that this process reads where all together read every one once; none where they are few."""
        return replace(self, sequences=self.sequences[world().share(len(self))])

    def mean(self, size: int, measure: Callable[[Batch], tuple[float, ...]]) -> tuple[float, ...]:
        """Means over the predictions that count of all sequences, read `size` at a time by all processes together.
        measure: means over a batch."""
        # A process without a sequence reads one that does not count, and so knows how many numbers there are.
        mine, weight = (self.mine, 1) if len(self.mine) else (replace(self, sequences=self.sequences[:1]), 0)
        sums: list[float] = []
        tokens = 0
        for batch in mine.batches(-(-size // world().size)):
            found = measure(batch)
            sums = [
                total + number * batch.tokens * weight
                for total, number in zip(sums or [0.0] * len(found), found, strict=True)
            ]
            tokens += batch.tokens * weight
        *totals, counted = world().totals(*sums, tokens)
        return tuple(total / counted for total in totals)


def _checked_window(model: ModelFolder, window: int) -> int:
    context = context_of(model.config)
    if window < 2 or (context is not None and window > context):
        limit = "" if context is None else f" to {context}, which the model takes"
        raise SwquantError(f"--window {window} is outside 2{limit}; 512 is usual")
    return window


def _padding(tokenizer: Any) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if isinstance(token, int))


def text_windows(model: ModelFolder, text: str, window: int, name: str = "text") -> Corpus:
    """A text in windows of `window` tokens that do not overlap, BOS in front where the tokenizer begins with it; what
    is left at the end is dropped. Raises SwquantError for a text shorter than two windows."""
    window = _checked_window(model, window)
    tokenizer = model.tokenizer()
    bos = begins_with(model, tokenizer)
    ids = torch.tensor(encode(model, text, special=False, tokenizer=tokenizer), dtype=torch.int64)
    body = window - (bos is not None)
    whole = len(ids) // body
    if whole < 2:
        raise SwquantError(
            f"{name}: {len(ids)} tokens are less than two windows of {window}; give a longer text, or a smaller --window"
        )
    rows = ids[: whole * body].view(whole, body)
    if bos is not None:
        rows = torch.cat([torch.full((whole, 1), bos), rows], dim=1)
    return token_windows(rows, name)


def own_windows(
    model: PreTrainedModel,
    start: int | None,
    saved: MutableMapping[str, Tensor],
    seed: int,
    progress: Progress,
    *,
    texts: int,
    length: int,
    name: str,
) -> Corpus:
    """What a model writes at temperature 1, or wrote when the run began. start: the token that a text begins with, None
    for any. saved: tensors of the run's state, which get it."""
    if "text" not in saved:
        made = world().same_tensors(
            lambda: {"text": write_text(model, start, seed, progress, texts=texts, length=length)}
        )
        saved.update(made)
    return token_windows(saved["text"], name)


def token_windows(tokens: Tensor, name: str) -> Corpus:
    """int64 [windows, length], every token of which counts."""
    return Corpus(name, tuple((row, torch.ones(len(row), dtype=torch.bool)) for row in tokens))


def conversations(model: ModelFolder, path: Path, window: int) -> Corpus:
    """A jsonl file, one conversation a line: {"prompt": …, "response": …} or {"messages": [{"role": …, "content": …}]}.

    Written with the tokenizer's chat template, or, for prompt and response where there is none, one after the other.
    The responses count, with the token that ends them. Longer ones are cut at `window` tokens. Raises SwquantError with
    the number of the first line that is broken, or of which no response is left.
    """
    window = _checked_window(model, window)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SwquantError(f"{path}: cannot be read ({error.strerror}); give a jsonl file") from None
    except UnicodeDecodeError:
        raise SwquantError(f"{path}: not UTF-8 text; give a jsonl file") from None
    tokenizer = model.tokenizer()
    bos = begins_with(model, tokenizer)
    sequences = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        ids, counted = _conversation(model, tokenizer, bos, _messages(line, where), where)
        ids, counted = ids[:window], counted[:window]
        if not bool(counted[1:].any()):
            raise SwquantError(
                f"{where} has no response within {window} tokens; shorten its prompt, or give a larger --window"
            )
        sequences.append((ids, counted))
    if len(sequences) < 2:
        raise SwquantError(f"{path}: {len(sequences)} conversations are too few; give 2 or more, one on a line")
    return Corpus(path.name, tuple(sequences), _padding(tokenizer))


def _messages(line: str, where: str) -> list[dict[str, str]]:
    """The messages of a line. Raises SwquantError unless they end with a response."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SwquantError(f"{where} is not JSON ({first_line(error)}); mend that line, or take it out") from None
    if not isinstance(content, dict):
        raise SwquantError(f'{where} is no object; write {{"prompt": "…", "response": "…"}}')
    if "messages" not in content:
        content = {"messages": [_said("user", content, "prompt"), _said("assistant", content, "response")]}
    messages = content["messages"]
    good = isinstance(messages, list) and all(
        isinstance(item, dict) and item.get("role") in _ROLES and isinstance(item.get("content"), str)
        for item in messages
    )
    if not good:
        raise SwquantError(
            f'{where}: needs "prompt" and "response", or "messages" with a "role" ({", ".join(_ROLES)}) and a "content" of text each'
        )
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise SwquantError(f"{where} does not end with a response (a message of the role assistant)")
    return [{"role": item["role"], "content": item["content"]} for item in messages]


def _said(role: str, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {"role": role, "content": content.get(key)}


def _conversation(
    model: ModelFolder, tokenizer: Any, bos: int | None, messages: list[dict[str, str]], where: str
) -> tuple[Tensor, Tensor]:
    """Ids and which of them count: what every message of the assistant adds to the text before it."""
    if getattr(tokenizer, "chat_template", None) is None:
        if [item["role"] for item in messages] != ["user", "assistant"]:
            raise SwquantError(f"{where} has messages, and the tokenizer no chat template; give prompt and response")
        ended = tokenizer.eos_token or ""
        pieces = [(messages[0]["content"], False), (messages[1]["content"] + ended, True)]
        parts = [([] if bos is None else [bos], False)]
    else:
        pieces, parts = _templated(tokenizer, messages, where), []
    parts += [
        (encode(model, text, special=False, tokenizer=tokenizer) if text else [], counts) for text, counts in pieces
    ]
    ids = torch.tensor([token for piece, _ in parts for token in piece], dtype=torch.int64)
    counted = torch.tensor([counts for piece, counts in parts for _ in piece], dtype=torch.bool)
    return ids, counted


def _templated(tokenizer: Any, messages: list[dict[str, str]], where: str) -> list[tuple[str, bool]]:
    """The conversation as text, in pieces that count or not. Raises SwquantError where the template refuses it, or
    writes earlier messages differently once there are later ones."""

    def written(count: int, *, ask: bool = False) -> str:
        with failures_of(f"{where}: the chat template refuses it", "look at the roles and their order"):
            text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        return text

    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = written(index, ask=True), written(index + 1)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise SwquantError(
                f"{where}: the chat template changes earlier messages ({shown(message['content'], 40)}), so that responses cannot be "
                "told apart; give single turns"
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return pieces
