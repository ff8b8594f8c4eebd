"""A batch of two texts of different length: where the padding must be, on either graph, and how the next token
follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

LONG, SHORT = [5, 9, 17, 33, 64, 2, 81], [40, 11, 99]
HOLES = [1] * (len(LONG) - len(SHORT))
RIGHT = [[1] * 7, [1] * 3 + [0] * 4]
LEFT = [[1] * 7, [0] * 4 + [1] * 3]


class _Session:
    """The graph with masks and positions of one's own."""

    def __init__(self, folder: Path) -> None:
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self._inputs = {item.name: item for item in self._session.get_inputs()}
        self._past = [item for name, item in self._inputs.items() if name.startswith("past_key_values.")]

    def run(self, ids: Any, mask: Any, positions: Any, past: Any = None) -> tuple[np.ndarray, list[np.ndarray]]:
        batch = len(ids)
        if past is None:
            past = [np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32) for item in self._past]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: np.array(value, np.int64) for name, value in given.items() if name in self._inputs}
        feeds |= {item.name: value for item, value in zip(self._past, past, strict=True)}
        logits, *present = self._session.run(None, feeds)
        return logits, present

    def alone(self, ids: list[int]) -> np.ndarray:
        logits, _ = self.run([ids], [[1] * len(ids)], [list(range(len(ids)))])
        return logits[0]


def _share(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.ptp(expected))


@pytest.fixture(scope="module", params=["exported", "genai"])
def graph(request: pytest.FixtureRequest) -> tuple[str, _Session]:
    if request.param == "genai":
        pytest.importorskip("onnxruntime_genai")
    return request.param, _Session(request.getfixturevalue(request.param))


def test_padded_on_the_right_every_text_is_as_if_alone(graph: tuple[str, _Session]) -> None:
    """The new token's place: behind all padding for torch's graph, behind the text itself for the builder's."""
    kind, session = graph
    ids = [LONG, SHORT + HOLES]
    logits, past = session.run(ids, RIGHT, [list(range(7))] * 2)
    assert _share(logits[0], session.alone(LONG)) < 1e-4
    assert _share(logits[1, :3], session.alone(SHORT)) < 1e-4
    mask = [[1] * 8, [1] * 3 + [0] * 4 + [1]] if kind == "exported" else [[1] * 8, [1] * 4 + [0] * 4]
    logits, _ = session.run([[7], [8]], mask, [[7], [3]], past)
    assert _share(logits[0, -1], session.alone([*LONG, 7])[-1]) < 1e-4
    assert _share(logits[1, -1], session.alone([*SHORT, 8])[-1]) < 1e-4


def test_padding_on_the_left_is_for_torchs_graph_only(graph: tuple[str, _Session]) -> None:
    """The builder's attention counts the ones of a mask and does not look where they are; docs/onnx.md says so."""
    kind, session = graph
    logits, _ = session.run([LONG, HOLES + SHORT], LEFT, [list(range(7)), [0] * 4 + [0, 1, 2]])
    assert _share(logits[0], session.alone(LONG)) < 1e-4
    difference = _share(logits[1, -1], session.alone(SHORT)[-1])
    assert (difference < 1e-4) == (kind == "exported")
