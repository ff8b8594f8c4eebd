"""The check after an export: the file is run on ONNX Runtime and compared with the torch model it was made from.

Compared are the logits of the prompt at once, and then of every token that the torch model continues it with, one at a
time through the cache; and what the restored outliers change. A file that differs by more than its arithmetic explains
is not written under its final name.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import PreTrainedModel

from exporters.errors import SwquantError
from exporters.onnx.files import MODEL
from swquant.checkpoints.schema import CheckRecord
from swquant.export.onnx.options import ExportOptions
from swquant.models.onnx_model import OnnxModel
from swquant.models.runtime import library_path, open_session
from swquant.units import short

__all__ = ["Reference", "check_export", "make_reference"]

_NEW_TOKENS = 16
# Largest difference of two logits, as a share of the range of all logits, by (precision, accuracy level).
_TOLERANCE = {("fp32", 0): 1e-4, ("fp16", 0): 0.02, ("fp32", 4): 0.15, ("fp16", 4): 0.15}


@dataclass(frozen=True)
class Reference:
    """What the torch model says. prompt: token ids. chosen: what it continues them with. prompt_logits [1, prompt,
    vocabulary]; next_logits [1, vocabulary] for each of chosen but the last."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    prompt_logits: np.ndarray
    next_logits: tuple[np.ndarray, ...]


def make_reference(model: PreTrainedModel, prompt: tuple[int, ...]) -> Reference:
    """Run the torch model on a prompt and let it continue greedily."""
    chosen: list[int] = []
    logits: list[np.ndarray] = []
    ids, past = torch.tensor([prompt]), None
    with torch.no_grad():
        while len(chosen) < _NEW_TOKENS:
            output = model(input_ids=ids, past_key_values=past, use_cache=True)
            logits.append(output.logits.to(torch.float32).numpy())
            chosen.append(int(logits[-1][0, -1].argmax()))
            ids, past = torch.tensor([chosen[-1:]]), output.past_key_values
    return Reference(prompt, tuple(chosen), logits[0], tuple(item[:, -1] for item in logits[1:]))


def _differences(model: OnnxModel, reference: Reference) -> tuple[float, int]:
    """(largest difference of the logits as a share of their range, tokens on which both agree)."""
    logits, past = model.step(np.array([reference.prompt]), model.empty_past(1))
    if not np.isfinite(logits).all():
        return float("inf"), 0
    pairs = [(logits.astype(np.float32), reference.prompt_logits)]
    same = int(logits[0, -1].argmax()) == reference.chosen[0]
    agreed = int(same)
    for token, expected, following in zip(reference.chosen, reference.next_logits, reference.chosen[1:], strict=False):
        logits, past = model.step(np.array([[token]]), past)
        if not np.isfinite(logits).all():
            return float("inf"), agreed
        pairs.append((logits[:, -1].astype(np.float32), expected))
        agreed += int(logits[0, -1].argmax()) == following
    span = max(float(np.ptp(expected)) for _, expected in pairs)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs) / span, agreed


def _without_outliers(folder: Path, deltas: Mapping[str, np.ndarray], config: Any, reference: Reference) -> float:
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(array)) for array in deltas.values()]
    for name, value in zip(deltas, values, strict=True):
        options.add_initializer(name, value)
    session = open_session(folder / MODEL, options, library=False)
    difference, _ = _differences(OnnxModel(session, config), reference)
    return difference


def _providers(folder: Path, config: Any, reference: Reference) -> dict[str, int]:
    """Provider -> nodes that ran on it, from a profile of one run."""
    with tempfile.TemporaryDirectory(prefix="swquant-profile-") as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "run")
        session = open_session(folder / MODEL, options)
        model = OnnxModel(session, config)
        model.step(np.array([reference.prompt]), model.empty_past(1))
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {
        (event["name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return dict(sorted(Counter(provider for _, provider in nodes).items()))


def check_export(
    folder: Path, deltas: Mapping[str, np.ndarray], config: Any, reference: Reference, options: ExportOptions
) -> CheckRecord:
    """Compare the model in `folder` with the reference. Raises SwquantError where it is another model.

    deltas: the initializers that hold outliers. Returns the record for the manifest.
    """
    difference, agreed = _differences(OnnxModel(open_session(folder / MODEL, library=False), config), reference)
    with_library = None
    if library_path() is not None and deltas:  # the file means the same to both, so the worse of the two decides
        with_library, also = _differences(OnnxModel(open_session(folder / MODEL), config), reference)
        difference, agreed = max(difference, with_library), min(agreed, also)
    tolerance = _TOLERANCE[options.precision, options.accuracy_level or 0]
    if not difference <= tolerance:
        raise SwquantError(
            f"the exported model differs from the checkpoint by {difference:.2g} of the range of its logits; "
            f"{tolerance:g} is what {options.precision} at accuracy level {options.accuracy_level} explains; nothing was written"
        )
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "prompt_tokens": len(reference.prompt),
        "generated_tokens": len(reference.chosen),
        "same_tokens": agreed,
        "operator_library": with_library is not None,
        "largest_difference": short(difference, 3),
        "tolerance": tolerance,
        "without_outliers": short(_without_outliers(folder, deltas, config, reference), 3) if deltas else None,
        "providers": _providers(folder, config, reference),
    }
