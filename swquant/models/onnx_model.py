"""An exported folder as a model: logits of a sequence, greedy text. What `eval` and `generate` run in place of
transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from exporters.errors import SwquantError, first_line
from swquant.models.runtime import open_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxModel", "Output"]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Output:
    """What calling a model gives: logits [batch, sequence, vocabulary], as transformers names them."""

    logits: Tensor


class OnnxModel:
    """A session and its cache. Callable like a transformers model, as far as this package calls one.

    config: a transformers configuration, which is only handed on. eos: the ids that end a text.
    """

    def __init__(self, session: onnxruntime.InferenceSession, config: Any, eos: Sequence[int] = ()) -> None:
        self.config = config
        self._session = session
        self._eos = set(eos)
        self._inputs = {item.name: item for item in session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        present = [name.replace("past_key_values", "present") for name in self._past]
        self._outputs = ["logits", *present]

    @staticmethod
    def open(path: Path, config: Any, eos: Sequence[int] = ()) -> OnnxModel:
        """The model in a file. Raises SwquantError where the runtime refuses it."""
        return OnnxModel(open_session(path), config, eos)

    def empty_past(self, batch: int) -> list[np.ndarray]:
        """Keys and values of no tokens, for every layer."""
        items = [self._inputs[name] for name in self._past]
        return [np.zeros((batch, item.shape[1], 0, item.shape[3]), _DTYPES[item.type]) for item in items]

    def step(self, ids: np.ndarray, past: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run int64 ids [batch, sequence] behind `past`. Returns (logits, the new past). Raises SwquantError where the
        runtime loaded the graph but has no kernel for one of its nodes."""
        batch, count = ids.shape
        before = past[0].shape[2]
        feeds: dict[str, np.ndarray] = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, before + count), np.int64),
            "position_ids": np.arange(before, before + count, dtype=np.int64)[None].repeat(batch, 0),
            **dict(zip(self._past, past, strict=True)),
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        try:
            logits, *present = self._session.run(self._outputs, feeds)
        except Exception as error:  # the runtime has a dozen exception classes of its own
            raise SwquantError(f"this onnxruntime cannot run the graph ({first_line(error)})") from None
        return logits, present

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Output:
        """Logits of a sequence, float32."""
        logits, _ = self.step(input_ids.numpy(), self.empty_past(len(input_ids)))
        return Output(torch.from_numpy(logits).to(torch.float32))

    def generate(self, input_ids: Tensor, max_new_tokens: int, streamer: Any = None, **_: Any) -> Tensor:
        """Append the likeliest token up to `max_new_tokens` times, or until one that ends the text. One sequence.
        streamer: as transformers has them, is given the prompt's ids and then each token."""
        ids, past = input_ids.numpy(), self.empty_past(1)
        chosen: list[int] = []
        if streamer is not None:
            streamer.put(input_ids)
        while len(chosen) < max_new_tokens and not (chosen and chosen[-1] in self._eos):
            logits, past = self.step(ids, past)
            chosen.append(int(logits[0, -1].argmax()))
            ids = np.array([chosen[-1:]], dtype=np.int64)
            if streamer is not None:
                streamer.put(torch.from_numpy(ids))
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, torch.tensor([chosen])], dim=1)
