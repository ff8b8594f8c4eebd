"""ONNX Runtime, with swquant's operator library and without, and onnxruntime-genai. See `deployments.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import report

asked = json.load(sys.stdin)
folder = Path(asked["file"])
torch.set_num_threads(asked["threads"])


def by_runtime(library: bool) -> tuple[Callable[[list[int]], np.ndarray], Callable[[int], list[int]]]:
    from swquant.models.onnx_model import OnnxModel
    from swquant.models.runtime import open_session

    model = OnnxModel(open_session(folder / "model.onnx", library=library), None)

    def logits(ids: list[int]) -> np.ndarray:
        return model.step(np.array([ids]), model.empty_past(1))[0][0].astype(np.float32)

    def written(count: int) -> list[int]:
        ids, past, found = np.array([asked["prompt"]]), model.empty_past(1), []
        for _ in range(count):
            scores, past = model.step(ids, past)
            found.append(int(scores[0, -1].argmax()))
            ids = np.array([found[-1:]])
        return found

    return logits, written


def by_genai() -> tuple[Callable[[list[int]], np.ndarray], Callable[[int], list[int]]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def generator(length: int) -> og.Generator:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return og.Generator(model, parameters)

    def logits(ids: list[int]) -> np.ndarray:
        """Token by token: genai hands out the last token's alone."""
        asking, rows = generator(len(ids) + 1), []
        for token in ids:
            asking.append_tokens([token])
            rows.append(asking.get_logits()[0, -1].astype(np.float32))
        return np.stack(rows)

    def written(count: int) -> list[int]:
        asking = generator(len(asked["prompt"]) + count)
        asking.append_tokens(asked["prompt"])
        for _ in range(count):
            asking.generate_next_token()
        return [int(token) for token in asking.get_sequence(0)[len(asked["prompt"]) :]]

    return logits, written


logits, written = by_genai() if asked["how"] == "genai" else by_runtime(asked["how"] == "library")
with Path(asked["out"]).open("wb") as file:
    for window in asked["windows"]:
        file.write(logits(window).tobytes())
report(written, asked["tokens"])
